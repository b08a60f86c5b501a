"""Does the search find what it should? A known operation shifts the validation and test images; training images stay as they are.

    python benchmarks/planted.py --task long --configs default paper --seeds 0 1 2 [--worker 0/2]    # runs what is missing
    python benchmarks/planted.py --table                                                           # writes results/planted.md

A search recovers the shift when the planted operation, its two copies together, ends with the largest dose of the 15 in the policy of the last λ:

    dose(o) = Σ_copies P(copy is applied) · Δ_o(magnitude),   Δ_o(m) = mean |o(x; m) - x| over 256 training images, pixels and channels in [0,1], both signs

Each run appends one line to results/planted/TASK/CONFIG.jsonl. Seconds are CPU seconds of a process with one thread, so that runs may go side by side.
"""
import argparse,gc,time
import torch
from torch import nn
import torch.nn.functional as F
from fastai.callback.all import *
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from functools import partial
from unittest import mock
from common import *
import hba_fastai.search as hba_callback
import hba_fastai.transform as hba_transform
from hba_fastai.search import HBACallback
from hba_fastai.evidence import SIGNAL
from hba_fastai.session import digits_net
from hba_fastai.data import digits
from hba_fastai.ops import OPS,OP_NAMES
from hba_fastai.pba import PBAPolicy
from hba_fastai.space import GEOMETRIC,TABLE7,PBASpace

OUT = RESULTS/'planted'

# --- tasks and shifts

# share of the images, magnitudes between; signed for the geometric operations
SHIFTS = {'Invert': (0.5,None), 'Rotate': (1,(0,30)), 'TranslateX': (1,(0,0.3)), 'TranslateY': (1,(0,0.3)), 'ShearX': (1,(0,0.3)), 'ShearY': (1,(0,0.3)), 'Color': (1,(0.1,0.4)),
          'Contrast': (1,(0.1,0.4)), 'Brightness': (1,(0.1,0.4)), 'Solarize': (0.5,(64,192))}

def shifted(x, op, seed):
    "Images (N,3,h,w) uint8, a share of them changed by `op` at magnitudes drawn for each"
    (share,span),g,n = SHIFTS[op],torch.Generator().manual_seed(seed),len(x)
    m = torch.zeros(n) if span is None else torch.rand(n, generator=g)*(span[1]-span[0])+span[0]
    if op in GEOMETRIC: m = torch.where(torch.rand(n, generator=g)<0.5, -m, m)
    on = torch.rand(n, generator=g)<share
    return torch.cat([torch.where(k[:,None,None,None], (OPS[op](o.float()/255, mm, fill=FILL)*255).round().byte(), o) for o,mm,k in zip(x.split(500), m.split(500), on.split(500))])

FILL = torch.tensor(MEAN)

def cifar_sets(seed, size=32):
    a,b,(x,y) = reduced_cifar(seed)
    f = (lambda x: x) if size==32 else (lambda x: small(x, size))
    return (f(a[0]),a[1]),(f(b[0]),b[1]),(f(x[:5000]),y[:5000])

def digits_sets(seed):
    x,y = digits()
    i = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split([500, 500, len(x)-1000])
    return [(x[j],y[j]) for j in i]

CIFAR_SHIFTS = 'Invert Rotate TranslateX ShearY Color Contrast Brightness Solarize'.split()
DIGIT_SHIFTS = 'Invert Rotate TranslateX TranslateY ShearX ShearY Contrast Brightness'.split()
TASKS = { # sets, network, batch, epochs, learning rate, weight decay, shifts, pixels of padding before the crop
    'cifar': (cifar_sets, lambda: wrn(10,1), 128, 30, 0.1, 5e-4, CIFAR_SHIFTS, 4),
    'cifar16': (partial(cifar_sets, size=16), lambda: wrn(10,1), 128, 20, 0.1, 5e-4, CIFAR_SHIFTS, 2),
    'long': (partial(cifar_sets, size=16), lambda: Bfloat16(wrn(10,1)), 128, 40, 0.1, 5e-4, CIFAR_SHIFTS, 2),
    'digits': (digits_sets, digits_net, 50, 30, 0.05, 5e-4, DIGIT_SHIFTS, 1),
    'wrn16': (cifar_sets, lambda: Bfloat16(wrn(16,1)), 128, 40, 0.1, 5e-4, CIFAR_SHIFTS, 4),
    'wrn16_80': (cifar_sets, lambda: Bfloat16(wrn(16,1)), 128, 80, 0.1, 5e-4, CIFAR_SHIFTS, 4)}

# --- configurations

class Variant(HBACallback):
    "`HBACallback` with what was tried and did not become an option"
    def __init__(self, travel=None, b1=0.9, antithetic=False, hyper_bs=None, gain=hba_callback.GAIN, decay=False, whiten=None, by_kind=False, bare=False, **kwargs):
        super().__init__(decay=decay, **kwargs)
        self.travel,self.b1,self.antithetic,self.hyper_bs,self.whiten,self.by_kind = travel,b1,antithetic,hyper_bs,whiten,by_kind
        self.bare = bare and self.condition=='dose'
        self.scale = None if whiten else gain/hba_callback.GAIN if self.condition=='dose' else 1.

    def attach(self):
        super().attach()
        if self.travel: self.rate = self.travel/(self.n_epoch*len(self.dls.train)//self.T_train*self.T_val)
        if self.hyper_bs:
            self.stream.bs = self.stream.dl.bs = self.hyper_bs
            self.stream.go_to(0, 0)

    def z(self, lam):
        "With `bare`: the mean dose at the bare λ. With `whiten`: features in units of their standard deviation at the start, times `whiten`"
        z = hba_callback.GAIN*self.policy.expected(lam) if self.bare else super().z(lam)
        if self.scale is None:
            g = torch.Generator().manual_seed(0)
            many = lam.detach() + self.sigma*torch.randn(20_000, len(lam), generator=g)
            sd = (hba_callback.GAIN*self.policy.features(self.policy.draw(many, g)) if self.condition=='dose' else many).std(0)
            self.scale = torch.where(sd>1e-6, self.whiten/sd, 0)
        return z*self.scale

    def _z_batch(self):
        ref = self.ref if self.centred else 0
        return (super()._z_batch()+ref)*self.scale-ref

    def hyper_step(self):
        adam = partial(adam_by_kind if self.by_kind else hba_callback.adam, b1=self.b1)
        with mock.patch.object(hba_callback, 'adam', adam): super().hyper_step()

def adam_by_kind(lam, g, state, lr, joint, b1=0.9, b2=0.999):
    "Adam with one second moment for the probabilities and one for the magnitudes"
    m,v,t = state
    m,v,t = m.lerp(g, 1-b1),v.lerp(g*g, 1-b2),t+1
    u = torch.cat([o.mean().expand(len(o)) for o in (v[:30],v[30:])])
    return lam - lr*(m/(1-b1**t)) / ((u/(1-b2**t)).sqrt()+1e-12),(m,v,t),g.isfinite().all()

def pairs(lam, sigma, n, generator, active):
    "As `population`, in pairs +ε and -ε"
    e = torch.randn((n+1)//2, len(lam), generator=generator)
    return lam + sigma*active*torch.cat([e,-e])[:n]

FIRST = dict(centred=True, start=0.05, floor=0.001, warmup=0., joint=False, gain=1., bare=True) # what the package began with
D = {**FIRST, 'condition': 'dose'}
B = {**D, 'start': (0.05,0.3), 'floor': 0.02}
S = {**B, 'joint': True}
W = {**S, 'warmup': 0.3}
PAPER = {**FIRST, 'condition': 'lambda', 'centred': False}
LETTER = {**PAPER, 'strategy': 'first_bn', 'fast': False, 'floor': None, 'hlr': 0.03}
BARE = {'bare': True}
CONFIGS = { # what it is, arguments
  'default': ('the defaults of the package: bare, the expectation taken under λ+ε', {}),
  'bare': ('W, features √5 times as long; the expectation taken at the bare λ, as in all rows below', BARE),
  'letter': ("`HBACallback.paper()`, α' = 0.03", LETTER), 'letter_decay': ("the same, φ decayed, α' = 0.03", {**LETTER, 'decay': True}),
  'paper': ("the paper's form, λ bounded, α' = 0.1", PAPER), 'paper_decay': ("the same, φ decayed, α' = 0.1", {**PAPER, 'decay': True}),
  'lambda': ('centred, conditioned on λ', {**FIRST, 'condition': 'lambda'}),
  'lambda_w': ('conditioned on λ, else as W', {**W, 'condition': 'lambda'}),
  'dose': ('centred, conditioned on the dose', D),
  'white': ('dose, features scaled to a standard deviation of 0.3', {**D, 'whiten': 0.3}),
  'white1': ('dose, features scaled to a standard deviation of 1', {**D, 'whiten': 1.}),
  'shared': ('dose, joint second moment', {**D, 'joint': True}),
  'm3_floor': ('B: dose, magnitudes start at 0.3, floor 0.02', B),
  'white_m3_floor': ('B, features scaled to 0.3', {**B, 'whiten': 0.3}),
  'm3_floor_kind': ('B, a second moment for probabilities and one for magnitudes', {**B, 'by_kind': True}),
  'm3_floor_shared': ('S: B with joint second moment', S),
  'S_bn': ('S, all batch norms', {**S, 'strategy': 'bn'}),
  'S_conv1bn1': ('S, first convolution and first batch norm', {**S, 'strategy': 'first_conv+first_bn'}),
  'S_p1_f05': ('S, probabilities start at 0.1, floor 0.05', {**S, 'start': (0.1,0.3), 'floor': 0.05}),
  'S_warm': ('S, warm-up 0.2', {**S, 'warmup': 0.2}), 'W5': ('S, warm-up 0.5', {**S, 'warmup': 0.5}),
  'W': ('W: S, warm-up 0.3', W),
  'W_bn': ('W, all batch norms', {**W, 'strategy': 'bn'}),
  'W_first_conv': ('W, first convolution', {**W, 'strategy': 'first_conv'}),
  'W_conv+bn': ('W, all convolutions and batch norms', {**W, 'strategy': 'conv+bn'}),
  'W_white': ('W, features scaled to 0.3', {**W, 'whiten': 0.3}),
  'W_hbs4': ('W, hyper-batches of 512', {**W, 'hyper_bs': 512}),
  'W_b97': ('W, first moment over 30 steps', {**W, 'b1': 0.97}),
  'W_t20': ('W, hyper learning rate 20/steps', {**W, 'travel': 20}),
  'W_s05': ('W, σ = 0.5', {**W, 'sigma': 0.5}), 'W_s2': ('W, σ = 2', {**W, 'sigma': 2.}),
  'W_T1': ('W, a hyper-step after every step', {**W, 'T_train': 1}),
  'W_pairs': ('W, ε in pairs +ε, -ε', {**W, 'antithetic': True}),
  'gain10': ('bare, features √10 times as long', {**BARE, 'gain': 10**0.5}), 'gain25': ('bare, features 5 times as long', {**BARE, 'gain': 5.}),
  'bn': ('bare, all batch norms', {**BARE, 'strategy': 'bn'}), 'first_conv': ('bare, first convolution', {**BARE, 'strategy': 'first_conv'}),
  'conv': ('bare, all convolutions', {**BARE, 'strategy': 'conv'}), 'conv+bn': ('bare, all convolutions and batch norms', {**BARE, 'strategy': 'conv+bn'}),
  's05': ('bare, σ = 0.5', {**BARE, 'sigma': 0.5}), 's2': ('bare, σ = 2', {**BARE, 'sigma': 2.}),
  'T1': ('bare, a hyper-step after every step', {**BARE, 'T_train': 1})}

# --- one run

def effects(x, values):
    "Mean absolute change of pixels (30,) by each entry of the space at its magnitude"
    sp,out = PBASpace(),[]
    m = F.pad(values.float(), (0,1))[PBAPolicy().column]
    for i,(op,_) in enumerate(sp.entries):
        signs = (-1,1) if op in GEOMETRIC else (1,)
        out.append(sum((OPS[op](x, torch.full((len(x),), s*m[i].item()), centre=torch.rand(len(x),2, generator=torch.Generator().manual_seed(0)), fill=FILL)-x).abs().mean().item() for s in signs)/len(signs))
    return torch.tensor(out)

def doses(x, lam):
    "Dose of each operation in the policy of λ: by pixel change, and by severity (0..1; 1 for operations without a magnitude)"
    policy,sp = PBAPolicy(),PBASpace()
    values = sp.values(lam)
    p = policy.p_applied(lam).double()
    hard = policy.severities(values).abs().clamp(max=1)
    hard[[not TABLE7[o] for o,_ in sp.entries]] = 1
    fold = lambda v: dict(zip(OP_NAMES, [round(o, 5) for o in (p*v).view(2,15).sum(0).tolist()]))
    return fold(effects(x, values)),fold(hard)

def run(task, config, shift, seed):
    "One search -> its line in the result file"
    sets,net,bs,epochs,lr,wd,_,pad = TASKS[task]
    a,b,c = sets(seed)
    if shift!='none': b,c = ((shifted(x, shift, seed+k), y) for k,(x,y) in ((1,b),(2,c)))
    set_seed(seed)
    tfms = [Normalize.from_stats(MEAN, STD), FlipCrop(pad, flip=task!='digits')]
    learn = Learner(array_dls(a, b, c, vocab=CLASSES, bs=bs, batch_tfms=tfms), net(), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=wd)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    hba,t = Variant(seed=seed, **CONFIGS[config][1]),time.process_time()
    with mock.patch.object(hba_transform, 'population', pairs if hba.antithetic else hba_transform.population):
        learn.fit(epochs, lr, cbs=[ParamScheduler({'lr': SchedCos(lr, 0.)}), NoValid(), hba])
    t = time.process_time()-t
    pixel,hard = doses(a[0][:256].float()/255, hba.lam.double())
    return dict(shift=shift, seed=seed, pixel=pixel, severity=hard, lam=[round(o, 3) for o in hba.lam.tolist()], test_error=error_on(learn, learn.dls[2]), cpu_seconds=round(t, 1),
                rate=hba.rate, moments=hba.moments.tolist(), points=[[round(v, 2) for v in l.tolist()] for _,l in hba.points[::max(1, epochs//6)]])

def rank(r, kind='pixel'):
    "Place of the planted operation among the doses, 0 for the largest"
    d = r[kind]
    return sorted(d, key=d.get, reverse=True).index(r['shift'])

def read(task, config):
    f = OUT/task/f'{config}.jsonl'
    return [json.loads(l) for l in f.read_text().splitlines()] if f.exists() else []

def wilson(k, n, z=1.96):
    "95% interval of a share"
    mid,half = (k+z*z/2)/(n+z*z),z*((k*(n-k)/n + z*z/4)**0.5)/(n+z*z)
    return mid-half,mid+half

def signals(rs):
    "`signal` of `HBACallback.report` of the planted operation, and of the others"
    plant,rest = [],[]
    for r in rs:
        _,g,g2 = np.array(r['moments'])
        z = -(g[:15]+g[15:30]) / np.sqrt(2*(g2[:15]+g2[15:30])+1e-30)
        for o,v in zip(OP_NAMES, z): (plant if o==r['shift'] else rest).append(v)
    return np.array(plant),np.array(rest)

ABOUT = {'digits': 'digits, 16 pixels, a network of three convolutions, 500 images, 30 epochs (150 hyper-steps without warm-up)',
         'cifar16': 'CIFAR-10 JPEG at 16 pixels, WRN-10-1, 4,000 images, 20 epochs (310 hyper-steps)', 'cifar': 'CIFAR-10 JPEG, WRN-10-1, 4,000 images, 30 epochs (465 hyper-steps)',
         'long': 'CIFAR-10 JPEG at 16 pixels, WRN-10-1 in bfloat16, 4,000 images, 40 epochs (620 hyper-steps without warm-up)',
         'wrn16': 'CIFAR-10 JPEG, WRN-16-1 in bfloat16, 4,000 images, 40 epochs (620 hyper-steps without warm-up)',
         'wrn16_80': 'the same, 80 epochs (1,240 hyper-steps without warm-up)'}

def table():
    "All results as Markdown"
    out = []
    for task,about in ABOUT.items():
        if not (OUT/task).exists(): continue
        out += [f'**{task}**: {about}; shifts: {", ".join(TASKS[task][6])}.', '', f'| configuration | runs | top-1 (95% interval) | top-3 (95% interval) | top-1 by severity | places of the planted operation, per shift | signal: planted, median (others, 95% quantile) | signal of {SIGNAL:g} or more: planted, others | error % on the shifted test set | CPU s |', '| --- '*10+'|']
        for c,(what,_) in CONFIGS.items():
            rs = read(task, c)
            if len(rs)<8: continue
            k,n = [rank(r)+1 for r in rs],len(rs)
            seen = [s for s in TASKS[task][6] if any(r['shift']==s for r in rs)]
            if len(seen)<len(TASKS[task][6]): what += f" ({', '.join(seen)} alone)"
            share = lambda j: '{:.2f} ({:.2f}, {:.2f})'.format(sum(p<=j for p in k)/n, *wilson(sum(p<=j for p in k), n))
            by = ' '.join(f"{s}:{','.join(str(p) for p,r in zip(k, rs) if r['shift']==s)}" for s in seen)
            plant,rest = signals(rs)
            out.append(f"| {what} | {n} | {share(1)} | {share(3)} | {sum(rank(r, 'severity')==0 for r in rs)/n:.2f} | {by} | {np.median(plant):.1f} ({np.quantile(rest, 0.95):.1f}) | {np.mean(plant>=SIGNAL):.2f}, {np.mean(rest>=SIGNAL):.2f} | "
                       f"{np.mean([r['test_error'] for r in rs]):.1f} | {np.mean([r['cpu_seconds'] for r in rs]):.0f} |")
        e = rs[-1]['environment'] if (rs:=read(task, next(c for c in CONFIGS if read(task, c)))) else {}
        out += ['', f"`{e['command']}` and the like, {e['date']}, torch {e['torch']}, {e['machine']}, one thread per run.", '']
    return '\n'.join(out)

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--task', default='cifar16', choices=list(TASKS))
    ap.add_argument('--configs', nargs='+', default=['default','paper'], choices=list(CONFIGS))
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--shifts', nargs='+')
    ap.add_argument('--worker', default='0/1', help='which part of the runs: this process / number of processes')
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    k,n = map(int, a.worker.split('/'))
    for config in [] if a.table else a.configs:
        for sh,s in [(sh,s) for s in a.seeds for sh in a.shifts or TASKS[a.task][6]][k::n]:
            if any(r['shift']==sh and r['seed']==s for r in read(a.task, config)): continue
            r,f = run(a.task, config, sh, s),OUT/a.task/f'{config}.jsonl'
            f.parent.mkdir(parents=True, exist_ok=True)
            with f.open('a') as o: o.write(json.dumps({**r, 'environment': environment()})+'\n')
            top = sorted(r['pixel'], key=r['pixel'].get, reverse=True)[:3]
            print(a.task, config, sh, s, 'place', rank(r)+1, [(o, round(r['pixel'][o],3)) for o in top], f"{r['test_error']:.1f}% {r['cpu_seconds']:.0f}s", flush=True)
            gc.collect() # a Learner is a cycle that holds its images
    OUT.with_suffix('.md').write_text(table())
