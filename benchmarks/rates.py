"""Does the search survive discriminative learning rates? `fine_tune` and `slice` train the first layers and the response φ at a hundredth of the head's.

    python benchmarks/rates.py --tasks digits photos --seeds 0 1 2     # runs what is missing, then writes the table
    python benchmarks/rates.py --table                                 # writes results/rates.md

A body of four convolutions is trained beforehand on six classes of the CIFAR-10 JPEG images at 16 pixels, then gets a new head for the digits or for the four
other classes. The target images of the hyper-steps and the shifted test images are changed by one planted operation (`planted.py`); the source images stay as
they are. Groups: layers 1-2 | layers 3-4 | head.

Each run appends one line to results/rates/TASK.jsonl:
    flow, remedy, shift, seed    what was run; remedies are those of `REMEDIES`, flows those of `FLOWS`
    place                        place of the planted operation by pixel dose, 1 is right; signal: its `signal` as `HBACallback.report` counts it
    shifted_error, source_error  error in percent on unseen test images with and without the shift
    hyper_steps, cpu_seconds     number of hyper-steps, CPU seconds of the fit with one thread
"""
import argparse,gc,time
from functools import lru_cache,partial
from itertools import product
import torch
from torch import nn
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner # with `fit_one_cycle` and `fine_tune`
from fastai.layers import ConvLayer
from fastai.torch_core import params,set_seed
from fastcore.foundation import L
from common import *
from planted import doses,moments,rank,shifted,signals,small
from hba_fastai.search import HBACallback
from hba_fastai.data import digits
from hba_fastai.layers import executed

OUT = RESULTS/'rates'
SHIFTS = 'Contrast Invert TranslateX none'.split()

# --- data: images at 16 pixels

NEW = [1,3,6,8] # automobile, cat, frog, ship
OLD = [c for c in range(10) if c not in NEW]

def of_classes(x, y, classes):
    "The images of some classes at 16 pixels, labelled by their place among them"
    i = torch.cat([(y==c).nonzero()[:,0] for c in classes]).sort().values
    return small(x[i], 16),torch.tensor([classes.index(c) if c in classes else -1 for c in range(10)])[y[i]]

@lru_cache
def photos(part, new): return of_classes(*cifar()[part], NEW if new else OLD)

def split(x, y, sizes, seed):
    i = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:sum(sizes)].split(sizes)
    return [(x[j],y[j]) for j in i]

def digits_sets(seed): return split(*digits(), [1000,200,597], seed)
def photos_sets(seed, n=1500): return [*split(*photos('train', True), [n,200], seed),*split(*photos('test', True), [2000], seed)]

TASKS = { # source, target and test images; names of the classes; epochs; learning rate
  'digits': (digits_sets, [str(o) for o in range(10)], 25, 1e-2),
  'photos': (photos_sets, [CLASSES[c] for c in NEW], 17, 1e-2),
  'few': (partial(photos_sets, n=400), [CLASSES[c] for c in NEW], 50, 1e-2)} # where low rates for the body do pay
BS = 50

# --- network, trained beforehand

def net(n): return nn.Sequential(
    nn.Sequential(ConvLayer(3,16), ConvLayer(16,32,stride=2), ConvLayer(32,32), ConvLayer(32,64,stride=2)),
    nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64,n)))

def splitter(m): return L(m[0][:2], m[0][2:], m[1]).map(params)

def learner(sets, vocab, model, bs=BS, tfms=()):
    learn = Learner(array_dls(*sets, vocab=vocab, bs=bs, batch_tfms=[Normalize.from_stats(MEAN, STD), *tfms]), model, splitter=splitter)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    return learn

@lru_cache
def body(seed, epochs=15):
    "Weights of the body after training on 6,000 images of the old classes"
    sets = [*split(*photos('train', False), [6000], seed),photos('test', False)]
    set_seed(seed)
    learn = learner(sets, [CLASSES[c] for c in OLD], net(len(OLD)), bs=128, tfms=[FlipCrop(2)])
    learn.fit_one_cycle(epochs, 5e-3, cbs=NoValid())
    print(f'body of seed {seed}: error {error_on(learn, learn.dls.valid):.1f}% on its own test images', flush=True)
    return learn.model[0].state_dict()

# --- ways to train, and what is done about the rates

FLOWS = { # what it is, (Learner, epochs, rate, callbacks) -> fit
  'one': ('`fit_one_cycle(n, lr)`', lambda learn,n,lr,cbs: learn.fit_one_cycle(n, lr, cbs=cbs)),
  'slice': ('`fit_one_cycle(n, slice(lr/100, lr))`', lambda learn,n,lr,cbs: learn.fit_one_cycle(n, slice(lr/100, lr), cbs=cbs)),
  'fine_tune': ('`fine_tune(n-1, lr)`', lambda learn,n,lr,cbs: learn.fine_tune(n-1, lr, cbs=cbs)),
  'lr_mult1': ('(e) `fine_tune(n-1, lr, lr_mult=1)`', lambda learn,n,lr,cbs: learn.fine_tune(n-1, lr, lr_mult=1, cbs=cbs))}
REMEDIES = {'nothing': 'no search', 'a': '(a) φ in the group of its layer', 'b': '(b) φ at the highest rate',
            'c': '(c) φ and the layers up to the responding one at the highest rate', 'd': '(d) φ and the whole first group at the highest rate',
            **{f'{r}w': f'({r}), λ frozen while layers are, and warm-up after that' for r in 'abd'},
            'default': 'the package since: φ at the highest rate, and `fine_tune` one course with one warm-up'}
ARMS = [(f,r) for f in FLOWS for r in REMEDIES # elsewhere the remedies change nothing
        if f=='fine_tune' or f=='slice' and 'w' not in r or r in ('nothing','a','default')]

def at_highest(opt, ps):
    "Let `ps` learn at the rate of the group with the highest one (ties: stay); returns the function that undoes it"
    lrs,ids,old = [h['lr'] for h in opt.hypers],{id(p) for p in ps},opt.param_lists
    moved = [[p for p in g if id(p) in ids and lr<max(lrs)] for g,lr in zip(old, lrs)]
    gone,best = {id(p) for g in moved for p in g},lrs.index(max(lrs))
    opt.param_lists = L(type(g)([p for p in g if id(p) not in gone] + (sum(moved, []) if i==best else [])) for i,g in enumerate(old))
    def undo(): opt.param_lists = old # in the old order, by which a saved optimizer finds its states
    return undo

class Rates(HBACallback):
    "`HBACallback` with a remedy of `REMEDIES`; (a) to (d) were measured on the package before it had one"
    def __init__(self, remedy, **kwargs):
        super().__init__(fast=remedy=='default', **kwargs)
        self.remedy,self.moved = remedy,[]

    def attach(self):
        super().attach()
        if self.remedy=='default': return
        share,done = self.warmup,self.course.done
        if 'w' in self.remedy and self.opt.frozen_idx: share = 1.
        if 'w' not in self.remedy and done: share = 0.
        self.clock.wait = done + share*self.learn.n_epoch # a warm-up for each fit, or for the first alone, as it was
        self.moved = self._moved()
        frozen = [p for p in self.moved if not p.requires_grad]
        for p in frozen: p.requires_grad_()
        self.undo.callback(lambda: [p.requires_grad_(False) for p in frozen])

    def _moved(self):
        "The parameters that the remedy moves"
        phi = [p for p,_ in self.net.params]
        if 'a' in self.remedy: return []
        if 'b' in self.remedy: return phi
        if 'd' in self.remedy: return list(self.opt.param_lists[0])
        layers = [r.layer for r in executed(self.learn.model, (torch.zeros(2,3,16,16),))]
        last = max(i for i,m in enumerate(layers) if any(m is h.layer for h in self.net.layers))
        return phi + [p for m in layers[:last+1] for p in m.parameters()]

    def before_step(self):
        "Not in `attach`: there `fit_one_cycle` has not set its rates yet, and all groups have the same"
        if self.moved: self.undo.callback(at_highest(self.opt, self.moved))
        self.moved = []

# --- one run

def run(task, flow, remedy, seed, shifts, quick=False):
    "One training -> its lines in the result file; without a search it is the same for all `shifts`"
    make,vocab,epochs,lr = TASKS[task]
    source,target,test = make(seed)
    def move(s, shift, k): return s if shift=='none' else (shifted(s[0], shift, seed+k),s[1])
    weights = body(seed, 1 if quick else 15)
    set_seed(seed)
    learn = learner([source, test, move(target, shifts[0], 1), *[move(test, s, 2) for s in shifts]], vocab, net(len(vocab)))
    learn.model[0].load_state_dict(weights)
    hba = None if remedy=='nothing' else Rates(remedy, seed=seed, valid=learn.dls[2])
    t = time.process_time()
    FLOWS[flow][1](learn, 2 if quick else epochs, lr, [NoValid(), *([hba] if hba else [])])
    t = time.process_time()-t
    for i,shift in enumerate(shifts):
        errors = dict(shifted_error=error_on(learn, learn.dls[3+i]), source_error=error_on(learn, learn.dls.valid))
        yield dict(flow=flow, remedy=remedy, shift=shift, seed=seed, **errors, cpu_seconds=round(t, 1), **(found(hba, source[0], shift) if hba else {}))

def found(hba, x, shift):
    "What a search found: the three operations with the largest doses, place and signal of the planted one"
    out = dict(hyper_steps=len(hba.lam.gradients()))
    if shift=='none' or not out['hyper_steps']: return out
    pixel,_ = doses(x[:256].float()/255, hba.lam.value.double())
    plant,_ = signals([dict(shift=shift, moments=moments(hba).tolist())])
    top = sorted(pixel, key=pixel.get, reverse=True)[:3]
    return dict(out, place=rank(dict(shift=shift, pixel=pixel))+1, signal=round(float(plant[0]), 2), top=top)

# --- results

def read(task):
    f = OUT/f'{task}.jsonl'
    return [json.loads(l) for l in f.read_text().splitlines()] if f.exists() else []

ABOUT = {'digits': 'digits, 1,000 source and 200 target images, 25 epochs of 20 steps',
         'photos': 'four classes of CIFAR-10 JPEG, 1,500 source and 200 target images, 17 epochs of 30 steps',
         'few': 'the same with 400 source images, 50 epochs of 8 steps'}
HEAD = ['training','remedy',*[f'{s}: {k}' for s in SHIFTS[:-1] for k in ('place','signal','error %')],
        'mean of the three','without the shift','no shift at all','hyper-steps','CPU s']

def row(rs, flow, remedy):
    "Cells of one flow and remedy"
    def of(*shifts): return [r for r in rs if (r['flow'],r['remedy'])==(flow,remedy) and r['shift'] in shifts]
    def each(key, shift): return ', '.join(f'{r[key]:g}' for r in of(shift) if key in r)
    def mean(key, *shifts): return f'{np.mean([r[key] for r in of(*shifts)]):.1f}' if of(*shifts) else ''
    planted = [o for s in SHIFTS[:-1] for o in (each('place', s), each('signal', s), pm([r['shifted_error'] for r in of(s)]))]
    errors = [mean('shifted_error', *SHIFTS[:-1]),mean('source_error', *SHIFTS[:-1]),pm([r['shifted_error'] for r in of('none')])]
    return [FLOWS[flow][0],REMEDIES[remedy],*planted,*errors,mean('hyper_steps', *SHIFTS[:-1]) if remedy!='nothing' else '0',mean('cpu_seconds', *SHIFTS)]

def table():
    "All results as Markdown, one row per flow and remedy"
    out = ['Place and signal of the planted operation seed by seed; errors as mean ± standard error (seeds). "Without the shift" is the error on unshifted '
           'test images of the searches for the three shifts, "no shift at all" that where the target images are unshifted too.', '']
    for task,about in ABOUT.items():
        rs = read(task)
        if not rs: continue
        e,seeds = rs[-1]['environment'],sorted({r['seed'] for r in rs})
        rows = [row(rs, *arm) for arm in ARMS if any((r['flow'],r['remedy'])==arm for r in rs)]
        out += [f'**{task}**: {about}; seeds {", ".join(map(str, seeds))}.', '']
        out += [f"| {' | '.join(o)} |" for o in (HEAD, ['---']*len(HEAD), *rows)]
        out += ['', f"`{e['command']}`, {e['date']}, torch {e['torch']}, {e['machine']}, one thread.", '']
    return '\n'.join(out)

def pm(v): return '{:.1f} ± {:.1f} ({})'.format(*mean_se(v), len(v)) if len(v)>1 else f'{v[0]:.1f}' if v else ''

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--tasks', nargs='+', default=list(TASKS), choices=list(TASKS))
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--flows', nargs='+', default=list(FLOWS), choices=list(FLOWS))
    ap.add_argument('--remedies', nargs='+', default=list(REMEDIES), choices=list(REMEDIES))
    ap.add_argument('--quick', action='store_true', help='two epochs, nothing is written')
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    arms = [(flow,remedy) for flow,remedy in ARMS if flow in a.flows and remedy in a.remedies]
    arms = [(*arm,shifts) for arm in arms for shifts in ([SHIFTS] if arm[1]=='nothing' else [[s] for s in SHIFTS])]
    for seed,task,(flow,remedy,shifts) in [] if a.table else product(a.seeds, a.tasks, arms):
        done = {(r['flow'],r['remedy'],r['seed'],r['shift']) for r in read(task)}
        if not a.quick and all((flow,remedy,seed,s) in done for s in shifts): continue
        for r in run(task, flow, remedy, seed, shifts, a.quick):
            print(task, {k:v for k,v in r.items() if v is not None}, flush=True)
            if a.quick: continue
            OUT.mkdir(parents=True, exist_ok=True)
            with (OUT/f'{task}.jsonl').open('a') as f: f.write(json.dumps({**r, 'environment': environment()})+'\n')
        gc.collect() # a Learner is a cycle that holds its images
        if not a.quick: OUT.with_suffix('.md').write_text(table())
    if not a.quick: OUT.with_suffix('.md').write_text(table())
