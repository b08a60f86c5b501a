"""The paper, row by row: a search in the paper's form, then trainings under its schedule.

    python benchmarks/paper.py --list
    python benchmarks/paper.py --table 4 --row cifar10_wrn-40-2 --data FOLDER [--download]         # in full: for a GPU
    python benchmarks/paper.py --table 10 --row cifar10_wrn-40-2_bn --scale small --data jpeg      # in small: minutes on one core
    python benchmarks/paper.py --table 4 --row svhn_wrn-28-10 --scale steps --data fake            # two steps of each part, to see that it works

tables.py holds the settings and the published figures. Each seed is a search and a training with that seed and with a split of its own, so a
standard deviation is that of both; the paper does not say which it is. Errors are those after the last epoch. Small means: 16 pixels, a small
network in bfloat16 (models.py), a quarter of a reduced set and a tenth of the others, 800 steps, and α' = 0.1, at which the package's rule (90 over
the number of hyper-steps) ends. Results are lines of results/paper/SCALE.jsonl, schedules lie beside them. A run that was killed goes on where it was: what is
finished is not done again, and the rest goes on behind its last epoch.
    part, search, training, seed      what was done
    data                              what the images were; 'CIFAR-10 as JPEG' stands in for CIFAR-10
    precision                         'bfloat16' (autocast) in small, and in full without a GPU; else 'float32'
    error, loss                       on the test images, or in the ablations on Val
    valid_error, valid_loss           of a search: on the images of its hyper-steps, which it has seen
    seconds, images_seen              of the fit, without validation but in Table 6: CPU seconds of one thread, or seconds with a GPU
    memory                            MiB: the peak on a GPU; else what one training step keeps for its backward pass
"""
import argparse,fcntl,os,sys,tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path
import torch
from fastai.callback.core import CancelEpochException
from fastai.callback.all import *
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from common import Bfloat16,NoValid,clock,environment,quiet
from images import Where,loaders
from models import MODELS
from surcharge import Held
from tables import *
from hba_fastai.checkpoint import load_checkpoint,save_checkpoint,set_rng_state
from hba_fastai.replay import ScheduleCallback
from hba_fastai.resume import training_state
from hba_fastai.search import HBACallback
from hba_fastai.stn import STNRates,stn_policy

SCALES = 'full','small','steps'
CACHE = Path(os.environ.get('HBA_CACHE', Path.home()/'.cache'/'hba-fastai'))/'paper'
STEPS = 800 # of a training in small

def scaled(s, scale):
    "A setting at another scale"
    if scale=='full': return s
    if scale=='steps': return s._replace(bs=4, n_train=8, n_valid=8 if s.n_valid else 0, epochs=1)
    part = 4 if s.n_train and s.n_train<=6000 else 10
    n = (s.n_train or 40_000)//part
    return s._replace(n_train=n, n_valid=s.n_valid//part, epochs=round(STEPS/(n//s.bs)), hlr=None)

# --- what is measured, and kept for a fit that goes on

class Measured(Callback):
    "Seconds and memory of a fit, also of the sittings before: `file` keeps them beside the checkpoint"
    order = 1000
    def __init__(self, file): self.file = file
    def before_fit(self):
        self.before = json.loads(self.file.read_text()) if self.file.exists() else dict(seconds=0., mib=0.)
        self.held,self.hooks,self.began,self.epochs = Held(),ExitStack(),clock(),0
        if torch.cuda.is_available(): torch.cuda.reset_peak_memory_stats()
    def before_batch(self):
        if self.training and not (torch.cuda.is_available() or self.held.most):
            self.hooks.enter_context(torch.autograd.graph.saved_tensors_hooks(self.held.keep, lambda t: t))
    def before_backward(self): self.stop()
    def after_fit(self): self.stop()
    def after_epoch(self):
        self.epochs = self.epoch+1
        self.file.write_text(json.dumps(self.measured()))
    def stop(self):
        self.hooks.close()
        self.held.end()
    def measured(self) -> dict:
        mib = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.held.most)/2**20
        return dict(seconds=self.before['seconds']+clock()-self.began, mib=max(mib, self.before['mib']))

class GoesOn(Callback):
    "A training under a schedule that is kept after each epoch, and goes on"
    order = 65 # behind `ScheduleCallback`, which makes the generators
    def __init__(self, file, policy): self.file,self.policy = file,policy
    def before_fit(self):
        self.saved = load_checkpoint(self.file, self.dls.device) if self.file.exists() else None
        if self.saved is None: return
        self.model.load_state_dict(self.saved['training']['model'])
        self.opt.load_state_dict(self.saved['training']['opt'])
    def before_epoch(self):
        if self.saved and self.epoch<self.saved['epoch']: raise CancelEpochException
    def before_train(self):
        if self.saved is None: return
        for k,g in self.policy.generators.items(): g.set_state(self.saved['generators'][k].cpu())
        self.dls.train.rng.setstate(self.saved['training']['train_rng'])
        set_rng_state(self.saved['training']['rng'])
        self.saved = None
    def after_epoch(self):
        if self.saved: return # an epoch that was left out
        generators = {k: g.get_state() for k,g in self.policy.generators.items()}
        save_checkpoint(self.file, dict(epoch=self.epoch+1, training=training_state(self.learn), generators=generators))

class KeptRates(STNRates):
    "STN's rule for a fit that goes on: `file` keeps the losses beside the checkpoint"
    def __init__(self, file): self.file = file
    def before_fit(self): self.losses = json.loads(self.file.read_text()) if self.file.exists() else []
    def after_epoch(self):
        if self.epoch<len(self.losses): return # an epoch that was left out
        try: super().after_epoch()
        finally: self.file.write_text(json.dumps([float(o) for o in self.losses]))

# --- a search and a training

def at_steps(lr, pct:float) -> float: return lr*0.1**sum(pct>o/270-1e-6 for o in (90,180,240))

def learner(s, where, scale, seed, weights):
    """A Learner on the split `seed`, whose weights are those of the seed `weights`: SGD with momentum 0.9, whose weight decay is a part of the gradient
    and acts on all weights, as torch's does"""
    set_seed(weights)
    dls = loaders(s, where, scale, seed)
    net = getattr(MODELS[s.model], 'small' if scale=='small' else 'full')(len(dls.vocab))
    if scale=='full' and not torch.cuda.is_available(): net = Bfloat16(net) # less than half of the time on a processor with AMX
    learn = Learner(dls, net.to(dls.device), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=s.wd, wd_bn_bias=True)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    return learn

def fit(learn, s, cb, files, *more) -> dict:
    "Train as `s` says with `cb`; what it took"
    measured = Measured(files('measured.json'))
    rule = [KeptRates(files('losses.json'))] if s.schedule=='stn' else \
           [NoValid(), ParamScheduler({'lr': SchedCos(s.lr, 0.) if s.schedule=='cosine' else partial(at_steps, s.lr)})]
    learn.fit(s.epochs, s.lr, cbs=[cb, *rule, *more, measured])
    took = measured.measured()
    precision = 'bfloat16' if isinstance(learn.model, Bfloat16) else 'float32'
    seen = measured.epochs*len(learn.dls.train)*s.bs # STN's rule may end earlier
    return dict(precision=precision, seconds=round(took['seconds'], 2), memory=round(took['mib'], 2), images_seen=seen)

def judged(learn, i, prefix='') -> dict:
    "Mean loss and error in percent of the model on the loader `i`, and the top-5 error on ImageNet"
    model,loss,wrong,wrong5,n = learn.model.eval(),0.,0,0,0
    with torch.no_grad():
        for xb,yb in learn.dls[i]:
            y,out = yb.as_subclass(torch.Tensor),model(xb.as_subclass(torch.Tensor))
            five = out.topk(5).indices==y[:,None]
            loss,n = loss+learn.loss_func(out, y).item()*len(y),n+len(y)
            wrong,wrong5 = wrong+(~five[:,0]).sum().item(),wrong5+(~five.any(1)).sum().item()
    top5 = {f'{prefix}top5_error': round(100*wrong5/n, 3)} if len(learn.dls.vocab)==1000 else {}
    return {f'{prefix}loss': round(loss/n, 5), f'{prefix}error': round(100*wrong/n, 3), **top5}

def search(row, s, where, scale, seed, files) -> dict:
    "The search of a row: its figures; its schedule is saved"
    learn = learner(s, where, scale, seed, seed)
    form = dict(hlr=s.hlr, strategy=s.strategy, sigma=s.sigma, seed=seed, checkpoint=files('search.pth'), resume=True)
    if s.schedule=='stn': form.update(policy=stn_policy(), start=None, warmup=0.01) # 5 epochs of 500 pass before λ moves; it starts where STN's does
    hba = HBACallback.paper(**form)
    took = fit(learn, s, hba, files)
    hba.schedule.save(files('schedule'))
    return {**took, **judged(learn, 1, 'valid_'), **judged(learn, 2), 'hlr': hba.provenance['hlr']}

def training(row, s, where, scale, seed, files) -> dict:
    "A training under the schedule of the row's search with the same seed"
    learn = learner(s, where, scale, seed, seed+1000) # the images of the search, other weights
    cb = ScheduleCallback(files('schedule'), seed=seed)
    return {**fit(learn, s, cb, files, GoesOn(files('training.pth'), cb)), **judged(learn, 1)}

# --- files and rows

class Files:
    "Where a part of a run keeps what it needs to go on, and what remains of it"
    def __init__(self, out, work, scale, search, training, seed, data):
        base = f'{search}_{scale}_{seed}' + ('' if data not in ('CIFAR-10 as JPEG','fake') else f"_{data.split()[-1].lower()}")
        self.schedule = out/'schedules'/f'{base}.json'
        self.work = work/(base+(f'_{training}' if training else ''))
    def __call__(self, what):
        if what=='schedule': return self.schedule
        self.work.mkdir(parents=True, exist_ok=True)
        return self.work/what
    def clear(self):
        for f in self.work.glob('*'): f.unlink()
        if self.work.exists(): self.work.rmdir()

def append(file, line):
    "One more line, whole, also where several processes write"
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open('a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        f.write(json.dumps(line)+'\n')

def run(row, where, scale, seeds, out, work):
    "What is missing of a row"
    for seed in seeds:
        parts = [('search',search,SEARCHES[row.search],None)]
        if row.training: parts.append(('training',training,TRAININGS[row.training],row.training))
        for part,f,settings,training_of in parts:
            what = dict(part=part, search=row.search, training=training_of, seed=seed, data=where.name(settings.data))
            if any(what.items()<=l.items() for l in lines_of(scale, out)): continue
            s,files = scaled(settings, scale),Files(out, work, scale, row.search, training_of, seed, where.name(settings.data))
            line = {**what, **f(row, s, where, scale, seed, files), 'setting': s._asdict(), 'environment': environment()}
            append(out/f'{scale}.jsonl', line)
            files.clear()
            print({k: v for k,v in line.items() if k not in ('setting','environment')}, flush=True)

def listed() -> str:
    "All rows, with the estimated GPU hours of each in full"
    out = []
    for name,(caption,rows) in TABLES.items():
        out += [f'--table {name}: {caption}', *(f'    --row {k:<42} about {hours_of_row(r):,.0f} GPU hours' for k,r in rows.items())]
    return '\n'.join(out)

def arguments():
    ap = argparse.ArgumentParser(description='Reproduce a row of the paper')
    ap.add_argument('--list', action='store_true', help='all rows')
    ap.add_argument('--compare', action='store_true', help='the results that there are, beside the published ones')
    ap.add_argument('--table', choices=list(TABLES))
    ap.add_argument('--row', nargs='+', help='its rows, or `all`')
    ap.add_argument('--scale', default='full', choices=SCALES)
    ap.add_argument('--data', help="folder of the data set, or 'jpeg', or 'fake'")
    ap.add_argument('--download', action='store_true', help='may torchvision fetch the data set into the folder?')
    ap.add_argument('--seeds', type=int, nargs='+', default=list(range(SEEDS)))
    ap.add_argument('--out', type=Path, help='folder of the results; default: results/paper')
    ap.add_argument('--work', type=Path, default=CACHE, help='folder of what an unfinished run needs to go on')
    return ap.parse_args()

def rows_of(a) -> list:
    "The rows that are meant, or an end with one sentence"
    if not (a.table and a.row and a.data): sys.exit("What to run is not said: give --table, --row and --data, or --list to see all rows")
    rows = TABLES[a.table][1]
    odd = [r for r in a.row if r not in rows and r!='all']
    if odd: sys.exit(f"Table {a.table} has no row {odd[0]!r}: use one of {', '.join(rows)}, or all")
    return list(rows.values()) if 'all' in a.row else [rows[r] for r in a.row]

def main():
    a = arguments()
    if a.list: return print(listed())
    if a.compare: return print('\n\n'.join(f'**Table {k}**: {caption}\n\n{compared(k)}' for k,(caption,_) in TABLES.items()))
    rows = rows_of(a)
    torch.set_num_threads(int(os.environ.get('OMP_NUM_THREADS', 1)))
    with tempfile.TemporaryDirectory() as passing: # two steps leave nothing behind
        out,work = (Path(passing) if a.scale=='steps' else None),(Path(passing) if a.scale=='steps' else a.work)
        for row in rows: run(row, Where(a.data, a.download), a.scale, a.seeds, a.out or out or RESULTS/'paper', work)

if __name__=='__main__': main()
