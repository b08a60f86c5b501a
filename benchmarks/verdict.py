"""Does a verdict by folds over 60 target images say what 997 unseen ones say, and does it choose the right arm?

    python benchmarks/verdict.py --seeds 0 1 2    # runs what is missing, then writes the table
    python benchmarks/verdict.py --table          # writes results/verdict.md

The digits of `payoff.py`: 500 source images, 60 target images and 997 unseen test images, rotated by up to 30°; a network of three convolutions,
batches of 50, 300 steps of SGD with one cycle, five folds. The same networks that a verdict judges by the images of their fold are tested on the
unseen images, when they have been trained: the mean over the folds is what the verdict is an estimate of.

results/verdict/digits.jsonl holds one line per shift and seed, and one with the environment where a process began:
    shift, seed, steps, k           what was run
    T_train                         training steps between the hyper-steps of HBA; 2 in lines without it
    arms                            {arm: {errors, n, error, low, high: the verdict's; test: error in percent on the unseen images, mean over the folds}}
    use, p                          the verdict's
    cpu_seconds                     CPU seconds of one thread, with those of the tests
"""
import argparse,json,tempfile,time
from functools import partial
from pathlib import Path
import numpy as np
import torch
from PIL import Image
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner # with `fit_one_cycle`
from fastai.optimizer import SGD
from fastai.vision.augment import Normalize
from common import RESULTS,NoValid,environment,error_on,made_by,quiet
from hba_fastai.all import HBACallback,array_dls
from hba_fastai.session import digits_net
from hba_fastai.verdict import hba_verdict
from payoff import BS,LR,MEAN,STD,WD,sets,shifted

OUT,K,STEPS,N = RESULTS/'verdict',5,300,60
FILE = OUT/'digits.jsonl'

class Tested(Callback):
    "Notes the error on `dls.valid` at the end of each fit"
    order = 1000 # when a search has given the plain network back
    def __init__(self, errors): self.errors = errors
    def after_fit(self): self.errors.append(error_on(self.learn, self.dl))

def write_files(folder, data):
    for i,(x,y) in enumerate(zip(*data)):
        f = Path(folder)/str(y.item())/f'{i}.png'
        f.parent.mkdir(exist_ok=True)
        Image.fromarray(x.permute(1,2,0).numpy()).save(f)

def run(shift, seed, steps=STEPS):
    "One verdict, and the test errors of its networks"
    t,(source,target,test) = time.process_time(),sets(seed)
    target,test = shifted(tuple(o[:N] for o in target), shift, 1000*seed+1),shifted(test, shift, 1000*seed+3)
    errors = []
    def make_learner():
        dls = array_dls(source, test, vocab=[str(o) for o in range(10)], bs=BS, batch_tfms=Normalize.from_stats(MEAN, STD), device='cpu')
        tested = Tested(errors)
        tested.dl = dls.valid # fine-tuning has loaders of its own
        learn = Learner(dls, digits_net(), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=WD, cbs=[NoValid(), tested])
        learn.remove_cb(ProgressCallback); learn.logger = quiet
        return learn
    with tempfile.TemporaryDirectory() as folder:
        write_files(folder, target)
        fit = lambda learn, cbs: learn.fit_one_cycle(steps*BS//len(source[1]), LR, cbs=cbs)
        v = hba_verdict(make_learner, folder, K, fit, seed=seed)
    means = [errors[0],*np.reshape(errors[1:], (-1,K)).mean(1)]
    arms = {r.pop('arm'): {**r, 'test': m} for r,m in zip(v.table.to_dict('records'), means)}
    print(v, {arm: r['test'] for arm,r in arms.items()}, flush=True)
    what = dict(shift=shift, seed=seed, steps=steps, k=K, T_train=HBACallback().T_train)
    return dict(**what, arms=arms, use=v.use, p=v.p, cpu_seconds=round(time.process_time()-t, 1))

def lines(): return [json.loads(l) for l in FILE.read_text().splitlines()] if FILE.exists() else []
def write(r):
    OUT.mkdir(parents=True, exist_ok=True)
    with FILE.open('a') as f: f.write(json.dumps(r)+'\n')

def key(r): return r['shift'],r.get('T_train', 2),r['seed']

def table():
    "All verdicts as Markdown"
    rs = sorted((r for r in lines() if 'arms' in r), key=key)
    out = [f'Error in percent by {K} folds over {N} target images, with its 95% interval → mean error of the same networks on 997 unseen images.',
           'The regret is the test error of the arm that the verdict names, above that of the best arm.', '']
    names = list(rs[0]['arms'])
    out += [f"| shift | T_train | seed | {' | '.join(names)} | use | p | regret | CPU s |", '| --- '*(len(names)+7)+'|']
    covered = []
    for r in rs:
        a = r['arms']
        covered += [o['low']<=o['test']<=o['high'] for o in a.values()]
        regret = a[r['use']]['test']-min(o['test'] for o in a.values())
        cells = [f"{o['error']:.0f} ({o['low']:.0f}-{o['high']:.0f}) → {o['test']:.1f}" for o in a.values()]
        out.append(f"| {' | '.join(map(str, key(r)))} | {' | '.join(cells)} | {r['use']} | {r['p']:.2g} | {regret:.1f} | {r['cpu_seconds']:.0f} |")
    out += ['', f'{sum(covered)} of {len(covered)} intervals hold the test error; those of a seed share their 60 images.', '',
            *made_by(l['environment'] for l in lines() if 'environment' in l)]
    return '\n'.join(out)

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--shifts', nargs='+', default=['Rotate'])
    ap.add_argument('--quick', action='store_true', help='twenty steps, nothing is written')
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    if a.quick: run(a.shifts[0], 100, 20); raise SystemExit
    if not a.table: write(dict(environment=environment()))
    done = {key(r) for r in lines() if 'arms' in r}
    for shift,seed in [] if a.table else [(shift,seed) for shift in a.shifts for seed in a.seeds]:
        if (shift,HBACallback().T_train,seed) not in done: write(run(shift, seed))
    OUT.with_suffix('.md').write_text(table())
