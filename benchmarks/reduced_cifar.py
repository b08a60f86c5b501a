"""HBA as the first version of this package had it, end to end on real images (`controls.py` is its successor): WRN-16-1 on
4,000 images of CIFAR-10 JPEG (10,000 validation, 10,000 test), batch 128.

    python benchmarks/reduced_cifar.py --epochs 40 --seeds 0 1      # runs what is missing, then writes the table

Three trainings per seed: flip+crop+Cutout; the same with an HBA search before it; the found schedule replayed + Cutout.
Each run writes results/reduced_cifar/ARM_EPOCHSep_seedN.json; the table of all of them is results/reduced_cifar.md. Runs may go side by side.
"""
import argparse,time
import torch
from fastai.callback.all import *
from fastai.learner import Learner
from fastcore.foundation import L
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from functools import partial
from common import *
from hba_fastai.search import HBACallback
from hba_fastai.replay import ScheduleCallback

OUT = RESULTS/'reduced_cifar'

def train(seed, epochs, cbs=None, cutout=True, depth=16, width=1, lr=0.05, wd=0.005, device=None):
    """One training as in Table 8: SGD with momentum 0.9, cosine to zero, not validated on the way.
    Returns the Learner, its errors in percent and its seconds"""
    set_seed(seed)
    dls = cifar_dls(reduced_cifar(seed), cutout=cutout, device=device)
    learn = Learner(dls, wrn(depth, width), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=wd) # weight decay as L2, as in the paper
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    lrs = ParamScheduler({'lr': SchedCos(lr, 0.)})
    t = time.perf_counter()
    learn.fit(epochs, lr, cbs=[lrs, NoValid(), *L(cbs)])
    return learn,dict(seconds=round(time.perf_counter()-t,1), valid_error=error_on(learn, dls[1]),
                      test_error=error_on(learn, dls[2]), train_loss=learn.recorder.losses[-1].item())

def run(arm, seed, epochs):
    "One arm of one seed -> its entry in the result file"
    if arm=='cutout': return train(seed, epochs)[1]
    condition = 'dose' if 'dose' in arm else 'lambda'
    sfile = RESULTS/'schedules'/f'wrn16-1_{epochs}ep_{condition}_seed{seed}.json'
    if arm.startswith('hba'):
        hba = HBACallback(condition=condition, start=0.05, floor=0.001, warmup=0., joint=False, seed=seed) # the defaults of the first version
        res = train(seed, epochs, hba)[1]
        sfile.parent.mkdir(parents=True, exist_ok=True)
        hba.schedule.save(sfile)
        return res
    return train(seed+1000, epochs, ScheduleCallback(sfile, seed=seed))[1]

NAMES = {'cutout': 'flip + crop + Cutout', 'hba': 'HBA search (conditioned on λ), + Cutout', 'replay': 'its schedule replayed + Cutout',
         'hba_dose': 'HBA search (conditioned on the dose), + Cutout', 'replay_dose': 'its schedule replayed + Cutout'}

def table(runs):
    "The result files as Markdown"
    rows = ['| training | epochs | seeds | valid error % | test error % | seconds | time ÷ plain |','| --- | --- | --- | --- | --- | --- | --- |']
    for epochs in sorted({r['epochs'] for r in runs}):
        plain = {r['seed']: r for r in runs if r['arm']=='cutout' and r['epochs']==epochs}
        for arm,name in NAMES.items():
            rs = [r for r in runs if r['arm']==arm and r['epochs']==epochs]
            if not rs: continue
            pm = lambda k: '{:.2f} ± {:.2f}'.format(*mean_se([r[k] for r in rs]))
            ratio = [r['seconds']/plain[r['seed']]['seconds'] for r in rs if r['seed'] in plain]
            seconds = mean_se([r['seconds'] for r in rs])[0]
            errors = f"{pm('valid_error')} | {pm('test_error')}"
            rows.append(f"| {name} | {epochs} | {len(rs)} | {errors} | {seconds:.0f} | {mean_se(ratio)[0]:.2f} |")
    e = runs[-1]['environment']
    return '\n'.join([f"WRN-16-1, 4,000 training / 10,000 validation / 10,000 test images of CIFAR-10 as JPEG, batch 128; mean ± standard error over seeds. "
                      f"The hyper-steps of a search use the validation images, so its validation error is optimistic.", '', *rows, '',
                      f"`{e['command']}`, {e['date']}, torch {e['torch']}, fastai {e['fastai']}, {e['machine']}, "
                      f"{e['threads']} thread(s) per run, two runs side by side.",''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--epochs', type=int, default=40)
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1])
    ap.add_argument('--arms', nargs='+', default=['cutout','hba','replay'], choices=list(NAMES))
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    for arm in [] if a.table else a.arms:
        for seed in a.seeds:
            f = OUT/f'{arm}_{a.epochs}ep_seed{seed}.json'
            if f.exists(): continue
            save_json(f, dict(arm=arm, epochs=a.epochs, seed=seed, **run(arm, seed, a.epochs), environment=environment()))
            print(f.read_text(), flush=True)
    runs = [json.loads(f.read_text()) for f in sorted(OUT.glob('*.json'))]
    if runs:
        OUT.with_suffix('.md').write_text(table(runs))
        print(table(runs))
