"""Does the search find what it should? A known operation shifts the validation and test images; training images stay as they are.

    python benchmarks/planted.py --task cifar --configs lambda dose --seeds 0 1 2 [--worker 0/2]     # runs what is missing
    python benchmarks/planted.py --table                                                           # writes results/planted.md

A search recovers the shift when the planted operation, its two copies together, ends with the largest dose of the 15 in the policy of the last λ:

    dose(o) = Σ_copies P(copy is applied) · Δ_o(magnitude),   Δ_o(m) = mean |o(x; m) - x| over 256 training images, pixels and channels in [0,1], both signs

Each run appends one line to results/planted/TASK/CONFIG.jsonl. Seconds are CPU seconds of a process with one thread, so that runs may go side by side.
"""
import argparse,math,time
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
import hba_fastai.callback as hba_callback
from hba_fastai.callback import HBACallback
from hba_fastai.cli import digits_net
from hba_fastai.data import digits
from hba_fastai.ops import OPS,OP_NAMES
from hba_fastai.policy import PBAPolicy
from hba_fastai.space import GEOMETRIC,TABLE7,Space
from reduced_cifar import NoValid

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

def small(x, size): return F.interpolate(x.float(), size, mode='area').round().byte()

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
    'digits': (digits_sets, digits_net, 50, 30, 0.05, 5e-4, DIGIT_SHIFTS, 1),
    'wrn16': (cifar_sets, lambda: wrn(16,1), 128, 60, 0.1, 5e-4, CIFAR_SHIFTS, 4)}

# --- configurations

def shared_adam(lam, g, state, lr, b1=0.9, b2=0.999, eps=1e-12, kind='all'):
    "Adam whose second moment is the mean over all hyperparameters, or over the probabilities and over the magnitudes: small gradients make small steps"
    m,v,t = state
    m,v,t = m.lerp(g, 1-b1),v.lerp(g*g, 1-b2),t+1
    mean = lambda v: v.mean().expand(len(v))
    u = mean(v) if kind=='all' else torch.cat([mean(v[:30]),mean(v[30:])])
    return lam - lr*(m/(1-b1**t)) / ((u/(1-b2**t)).sqrt()+eps),(m,v,t),g.isfinite().all()

class Variant(HBACallback):
    "`HBACallback` with what was tried and did not become an option"
    def __init__(self, travel=None, b1=0.9, b2=0.999, antithetic=False, tied=False, hyper_bs=None, warm=0., cool=False, lr_v=1., phi_u=None, decay=False, start_p=None, start_m=None, floor=None, whiten=None, shared=None, **kwargs):
        super().__init__(**kwargs)
        if start_p: self.lam[:30] = math.log(start_p/(1-start_p))
        if start_m: self.lam[30:] = math.log(start_m/(1-start_m))
        self.floor,self.whiten,self.shared,self.D = floor,whiten,shared,None
        self.travel,self.b1,self.b2,self.antithetic,self.tied,self.hyper_bs,self.warm,self.cool,self.lr_v,self.phi_u,self.decay = travel,b1,b2,antithetic,tied,hyper_bs,warm,cool,lr_v,phi_u,decay

    def attach(self):
        super().attach()
        n = self.n_epoch*len(self.dls.train)//self.T_train*self.T_val
        if self.travel: self.rate = self.travel/n
        self.rate0 = self.rate
        if self.hyper_bs: self.stream.dl = self.stream.dl.new(bs=self.hyper_bs)
        g = torch.Generator().manual_seed(self.base_seed)
        for l in self.hnet.layers:
            for u in l.U.values():
                if self.phi_u: u.data = torch.randn(u.shape, generator=g)*self.phi_u
        if self.decay:
            for p,_ in self.hnet.params: self.opt.state[p].pop('do_wd', None)

    def z(self, lam):
        "With `whiten`: features in units of their standard deviation at the start, times `whiten`"
        z = super().z(lam)
        if not self.whiten: return z
        if self.D is None:
            g = torch.Generator().manual_seed(0)
            many = lam.detach() + self.sigma*torch.randn(20_000, len(lam), generator=g)
            sd = (self.policy.features(self.policy.draw(many, g)) if self.condition=='dose' else many).std(0)
            self.D = torch.where(sd>1e-6, self.whiten/sd, 0)
        return z*self.D

    def _z_batch(self):
        if not self.whiten: return super()._z_batch()
        return (self.policy.features(self.tfm.drawn) if self.condition=='dose' else self.tfm.lam_i)*self.D-self.ref

    def after_backward(self):
        super().after_backward()
        for l in self.hnet.layers:
            for v in l.V.values(): v.grad *= self.lr_v

    def after_batch(self):
        if self.pct_train<self.warm: self.count = 0
        super().after_batch()

    def hyper_step(self):
        if self.cool: self.rate = self.rate0*math.cos(math.pi/2*self.pct_train)
        def average(g): # the two copies of an operation get the mean of their gradients
            a,b = g[:30].view(2,15).mean(0),g[30:].view(2,12).mean(0)
            return torch.cat([a,a,b,b])
        adam = partial(shared_adam if self.shared else hba_callback.adam, b1=self.b1, b2=self.b2, **({'kind': self.shared} if self.shared else {}))
        with mock.patch.object(hba_callback, 'adam', adam),mock.patch.object(hba_callback, 'average', average if self.tied else hba_callback.average): super().hyper_step()
        if self.floor: # keeps every operation alive, so that its effect can still be seen
            lam = self.lam.clamp(min=math.log(self.floor/(1-self.floor)))
            ref = self.z(lam).detach()
            self.hnet.fold(ref-self.ref)
            self.lam,self.ref = lam,ref

def pairs(lam, sigma, n, generator, active):
    "As `population`, in pairs +ε and -ε"
    e = torch.randn((n+1)//2, len(lam), generator=generator)
    return lam + sigma*active*torch.cat([e,-e])[:n]

PAPER = dict(condition='lambda', centred=False, decay=True)
CONFIGS = {'lambda': {}, 'dose': dict(condition='dose'), 'paper': PAPER}
for t in (5,10,20,45,90): CONFIGS[f'dose_t{t}'] = dict(condition='dose', travel=t); CONFIGS[f'lambda_t{t}'] = dict(travel=t)
for b in (0.5,0.99): CONFIGS[f'dose_b{b}'] = dict(condition='dose', b1=b); CONFIGS[f'dose_t20_b{b}'] = dict(condition='dose', b1=b, travel=20)

D = dict(condition='dose')
CONFIGS |= {'floor': {**D, 'floor': 0.02}, 'm3': {**D, 'start_m': 0.3}, 'm3_floor': {**D, 'start_m': 0.3, 'floor': 0.02}, 'white': {**D, 'whiten': 0.3}, 'white1': {**D, 'whiten': 1.},
  'white_floor': {**D, 'whiten': 0.3, 'floor': 0.02}, 'white_m3': {**D, 'whiten': 0.3, 'start_m': 0.3}, 'white_m3_floor': {**D, 'whiten': 0.3, 'start_m': 0.3, 'floor': 0.02},
  'white_m3_floor_b99': {**D, 'whiten': 0.3, 'start_m': 0.3, 'floor': 0.02, 'b1': 0.99}, 'white_m3_p1_floor': {**D, 'whiten': 0.3, 'start_m': 0.3, 'start_p': 0.1, 'floor': 0.02},
  'white_m3_floor_t20': {**D, 'whiten': 0.3, 'start_m': 0.3, 'floor': 0.02, 'travel': 20}, 'white_m3_floor_warm': {**D, 'whiten': 0.3, 'start_m': 0.3, 'floor': 0.02, 'warm': 0.2}}

B = {**D, 'start_m': 0.3, 'floor': 0.02}
CONFIGS |= {'shared': {**D, 'shared': 'all'}, 'm3_floor_shared': {**B, 'shared': 'all'}, 'm3_floor_kind': {**B, 'shared': 'kind'}, 'white_m3_floor_shared': {**B, 'whiten': 0.3, 'shared': 'all'},
  'white_m3_floor_kind': {**B, 'whiten': 0.3, 'shared': 'kind'}, 'm3_floor_shared_b99': {**B, 'shared': 'all', 'b1': 0.99}, 'm3_floor_shared_t20': {**B, 'shared': 'all', 'travel': 20},
  'm3_floor_shared_anti': {**B, 'shared': 'all', 'antithetic': True}, 'm3_floor_shared_s2': {**B, 'shared': 'all', 'sigma': 2.}, 'm3_floor_shared_s05': {**B, 'shared': 'all', 'sigma': 0.5}}

S = {**B, 'shared': 'all'}
CONFIGS |= {'S_bn': {**S, 'strategy': 'bn'}, 'S_first_conv': {**S, 'strategy': 'first_conv'}, 'S_conv1bn1': {**S, 'strategy': 'first_conv+first_bn'}, 'S_conv+bn': {**S, 'strategy': 'conv+bn'}, 'S_warm': {**S, 'warm': 0.2},
  'S_hbs4': {**S, 'hyper_bs': 512}, 'S_p1': {**S, 'start_p': 0.1}, 'S_m5': {**S, 'start_m': 0.5}, 'S_lrv5': {**S, 'lr_v': 5.}, 'S_cool': {**S, 'cool': True}, 'S_T1': {**S, 'T_train': 1}, 'S_f04': {**S, 'floor': 0.04},
  'S_lambda': {**S, 'condition': 'lambda'}, 'S_p1_f05': {**S, 'start_p': 0.1, 'floor': 0.05}, 'S_t20': {**S, 'travel': 20}, 'S_t10': {**S, 'travel': 10}}

# --- one run

def effects(x, values):
    "Mean absolute change of pixels (30,) by each entry of the space at its magnitude"
    sp,out = Space(),[]
    m = F.pad(values.float(), (0,1))[PBAPolicy().column]
    for i,(op,_) in enumerate(sp.entries):
        signs = (-1,1) if op in GEOMETRIC else (1,)
        out.append(sum((OPS[op](x, torch.full((len(x),), s*m[i].item()), centre=torch.rand(len(x),2, generator=torch.Generator().manual_seed(0)), fill=FILL)-x).abs().mean().item() for s in signs)/len(signs))
    return torch.tensor(out)

def doses(x, lam):
    "Dose of each operation in the policy of λ: by pixel change, and by severity (0..1; 1 for operations without a magnitude)"
    policy,sp = PBAPolicy(),Space()
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
    hba,t = Variant(**{'seed': seed, **CONFIGS[config]}),time.process_time()
    with mock.patch.object(hba_callback, 'population', pairs if hba.antithetic else hba_callback.population):
        learn.fit(epochs, lr, cbs=[ParamScheduler({'lr': SchedCos(lr, 0.)}), NoValid(), hba])
    t = time.process_time()-t
    pixel,hard = doses(a[0][:256].float()/255, hba.lam.double())
    return dict(shift=shift, seed=seed, pixel=pixel, severity=hard, lam=[round(o, 3) for o in hba.lam.tolist()], test_error=error_on(learn, learn.dls[2]), cpu_seconds=round(t, 1),
                rate=hba.rate0, moments=hba.moments.tolist(), points=[[round(v, 2) for v in l.tolist()] for _,l in hba.points[::max(1, epochs//6)]])

def rank(r, kind='pixel'):
    "Place of the planted operation among the doses, 0 for the largest"
    d = r[kind]
    return sorted(d, key=d.get, reverse=True).index(r['shift'])

def read(task, config):
    f = OUT/task/f'{config}.jsonl'
    return [json.loads(l) for l in f.read_text().splitlines()] if f.exists() else []

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--task', default='cifar', choices=list(TASKS))
    ap.add_argument('--configs', nargs='+', default=['dose'])
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--shifts', nargs='+')
    ap.add_argument('--worker', default='0/1', help='which part of the runs: this process / number of processes')
    a = ap.parse_args()
    torch.set_num_threads(1)
    k,n = map(int, a.worker.split('/'))
    for config in a.configs:
        todo = [(sh,s) for s in a.seeds for sh in a.shifts or TASKS[a.task][6]]
        for sh,s in todo[k::n]:
            if any(r['shift']==sh and r['seed']==s for r in read(a.task, config)): continue
            r = run(a.task, config, sh, s)
            f = OUT/a.task/f'{config}.jsonl'
            f.parent.mkdir(parents=True, exist_ok=True)
            with f.open('a') as o: o.write(json.dumps({**r, 'environment': environment()})+'\n')
            top = sorted(r['pixel'], key=r['pixel'].get, reverse=True)[:3]
            print(a.task, config, sh, s, 'rank', rank(r), rank(r, 'severity'), [(o, round(r['pixel'][o],3)) for o in top], f"{r['test_error']:.1f}% {r['cpu_seconds']:.0f}s", flush=True)
