"""Does the search find what it should? A known operation shifts validation and test images; training images stay as they are.

    python benchmarks/planted.py --task long --configs default paper --seeds 0 1 2 [--worker 0/2] # runs what is missing
    python benchmarks/planted.py --task long --starts                               # what stands in front without a search, once there are runs
    python benchmarks/planted.py --table                                            # writes results/planted.md

A search recovers the shift when the planted operation, its two copies together, ends with the largest dose of the 15 in the
policy of the last λ:

    dose(o) = Σ_copies P(copy is applied) · Δ_o(magnitude)
    Δ_o(m) = mean |o(x; m) - x| over 256 training images, pixels and channels in [0,1], both signs

Of two planted operations (`A+B`) the place is that of the later one: 2 where both are in front, and that is what counts as top-1 then.

Test errors on photographs are of the first 5,000 test images, which belong to five of the ten classes: compare them within a table alone.

Each run appends one line to results/planted/TASK/CONFIG.jsonl. Seconds are CPU seconds of a process with one thread, so that
runs may go side by side.
"""
import argparse,gc,time
import torch
import torch.nn.functional as F
from fastai.callback.all import *
from fastai.learner import Learner
from fastai.metrics import error_rate
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from functools import partial
from common import *
from hba_fastai.search import HBACallback
from hba_fastai.evidence import SIGNAL,is_named,signal,standing
from hba_fastai.session import digits_net
from hba_fastai.data import digits
from hba_fastai.ops import OPS,OP_NAMES
from hba_fastai.pba import GAIN,PBAPolicy
from hba_fastai.policy import SPREAD,Policy
from hba_fastai.space import GEOMETRIC,START,TABLE7,PBASpace
from hba_fastai.verdict import wilson

OUT = RESULTS/'planted'

# --- tasks and shifts

# share of the images, magnitudes between; signed for the geometric operations
SHIFTS = {
    'Invert': (0.5,None), 'Solarize': (0.5,(64,192)), 'Rotate': (1,(0,30)),
    'TranslateX': (1,(0,0.3)), 'TranslateY': (1,(0,0.3)), 'ShearX': (1,(0,0.3)), 'ShearY': (1,(0,0.3)),
    'Color': (1,(0.1,0.4)), 'Contrast': (1,(0.1,0.4)), 'Brightness': (1,(0.1,0.4))}

def shifted(x, ops, seed):
    "Images (N,3,h,w) uint8 under one operation after the other, by its `SHIFTS`"
    for k,op in enumerate(ops.split('+')): x = changed(x, op, seed+100*k)
    return x

def changed(x, op, seed):
    "A share of the images changed by `op` at magnitudes drawn for each"
    (share,span),g,n = SHIFTS[op],torch.Generator().manual_seed(seed),len(x)
    m = torch.zeros(n) if span is None else torch.rand(n, generator=g)*(span[1]-span[0])+span[0]
    if op in GEOMETRIC: m = torch.where(torch.rand(n, generator=g)<0.5, -m, m)
    on = torch.rand(n, generator=g)<share
    change = lambda x, m: (OPS[op](x.float()/255, m, fill=FILL)*255).round().byte()
    parts = zip(*[o.split(500) for o in (x,m,on)])
    return torch.cat([torch.where(k[:,None,None,None], change(part, m), part) for part,m,k in parts])

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
PAIRS = [f'{a}+{b}' for a in ('Invert','Contrast','Brightness') for b in ('Rotate','TranslateX','ShearX','ShearY')]
TASKS = { # sets, network, batch, epochs, learning rate, weight decay, shifts, pixels of padding before the crop
    'cifar': (cifar_sets, lambda: wrn(10,1), 128, 30, 0.1, 5e-4, CIFAR_SHIFTS, 4),
    'cifar16': (partial(cifar_sets, size=16), lambda: wrn(10,1), 128, 20, 0.1, 5e-4, CIFAR_SHIFTS, 2),
    'long': (partial(cifar_sets, size=16), lambda: Bfloat16(wrn(10,1)), 128, 40, 0.1, 5e-4, CIFAR_SHIFTS, 2),
    'digits': (digits_sets, digits_net, 50, 30, 0.05, 5e-4, DIGIT_SHIFTS, 1),
    'pairs': (digits_sets, digits_net, 50, 30, 0.05, 5e-4, PAIRS, 1),
    'wrn16': (cifar_sets, lambda: Bfloat16(wrn(16,1)), 128, 40, 0.1, 5e-4, CIFAR_SHIFTS, 4),
    'wrn16_80': (cifar_sets, lambda: Bfloat16(wrn(16,1)), 128, 80, 0.1, 5e-4, CIFAR_SHIFTS, 4)}

# --- configurations

STEPS = dict(T_train=2, moves=1, share=1., pull=0.) # of all that follows but the default: its hyper-steps (see cheap_steps.py), and λ goes free

class Variant(HBACallback):
    "`HBACallback` with what was tried and did not become an option"
    def __init__(self, bare=False, scale=None, groups=None, **kwargs):
        self.bare,self.scale,self.groups = bare,scale,groups
        super().__init__(**{**STEPS, **kwargs})

    def insert(self, policies, lam):
        "With `scale`, a function of a policy: what its dose is multiplied by"
        if self.scale: policies.scales = [self.scale(p) for p in policies.parts]
        super().insert(policies, lam)

    def z(self, lam):
        "With `bare`: the mean dose at the bare λ"
        return self.bound.expected(lam) if self.bare else super().z(lam)

    def new_lam(self):
        "With `groups`: sizes of the groups that share a second moment"
        lam = super().new_lam()
        lam.groups = self.groups or lam.groups
        return lam

def times(gain): return lambda policy: gain
def to_spread(sd): return lambda policy: Policy.scale(policy, 1.)*sd/SPREAD

# D is what the package began with
D = partial(Variant, bare=True, scale=times(1.), start=0.05, floor=0.001, warmup=0., joint=False)
B = partial(D, start=(0.05,0.3), floor=0.02)
S = partial(B, joint=True)
W = partial(S, warmup=0.3)
LAMBDA = dict(condition='lambda', bare=False, scale=None)
PAPER = partial(HBACallback.paper, hlr=None, floor=0.001, fast=True)
BARE = partial(Variant, bare=True)
BY_KIND = [30,24] # probabilities, magnitudes
CONFIGS = { # what it is, what makes it
  'default': ('the defaults of the package', HBACallback),
  'sparing': ('the defaults and `sparing=True`; doses are those of λ', partial(HBACallback, sparing=True)),
  'sparing_all': ('the same, but what the search adds is spared as well', None),
  'T2': ('bare, the expectation taken under λ+ε: the default, but λ is not pulled, and a hyper-step comes every 2 training steps',
         partial(HBACallback, **STEPS)),
  'best': ('T2, but of 3 sampled λ the best is taken (Eq. 9): about the cost of a gradient',
           partial(HBACallback, exploit='best', **STEPS)),
  'best10': ('the same, of 10', partial(HBACallback, exploit='best', population_size=10, **STEPS)),
  'best_error': ('T2, but of 3 sampled λ that of the smallest error rate is taken',
                 partial(HBACallback, exploit='best', hyper_loss=error_rate, **STEPS)),
  'bare': ('W, features √5 times as long; the expectation taken at the bare λ, as in all rows below', BARE),
  'letter': ("`HBACallback.paper()`, α' = 0.03", HBACallback.paper),
  'letter_decay': ("the same, φ decayed, α' = 0.03", partial(HBACallback.paper, decay=True)),
  'paper': ("the paper's form, λ bounded, α' = 0.1", PAPER),
  'paper_decay': ("the same, φ decayed, α' = 0.1", partial(PAPER, decay=True)),
  'lambda': ('centred, conditioned on λ', partial(D, **LAMBDA)),
  'lambda_w': ('conditioned on λ, else as W', partial(W, **LAMBDA)),
  'dose': ('centred, conditioned on the dose', D),
  'white': ('dose, features scaled to a standard deviation of 0.3', partial(D, scale=to_spread(0.3))),
  'white1': ('dose, features scaled to a standard deviation of 1', partial(D, scale=to_spread(1.))),
  'shared': ('dose, joint second moment', partial(D, joint=True)),
  'm3_floor': ('B: dose, magnitudes start at 0.3, floor 0.02', B),
  'white_m3_floor': ('B, features scaled to 0.3', partial(B, scale=to_spread(0.3))),
  'm3_floor_kind': ('B, a second moment for probabilities and one for magnitudes', partial(B, groups=BY_KIND)),
  'white_m3_floor_kind': ('the same, features scaled to 0.3', partial(B, groups=BY_KIND, scale=to_spread(0.3))),
  'm3_floor_shared': ('S: B with joint second moment', S),
  'white_m3_floor_shared': ('S, features scaled to 0.3', partial(S, scale=to_spread(0.3))),
  'S_bn': ('S, all batch norms', partial(S, strategy='bn')),
  'S_conv1bn1': ('S, first convolution and first batch norm', partial(S, strategy='first_conv+first_bn')),
  'S_p1_f05': ('S, probabilities start at 0.1, floor 0.05', partial(S, start=(0.1,0.3), floor=0.05)),
  'S_warm': ('S, warm-up 0.2', partial(S, warmup=0.2)), 'W5': ('S, warm-up 0.5', partial(S, warmup=0.5)),
  'W': ('W: S, warm-up 0.3', W),
  'W_bn': ('W, all batch norms', partial(W, strategy='bn')),
  'W_first_conv': ('W, first convolution', partial(W, strategy='first_conv')),
  'W_conv+bn': ('W, all convolutions and batch norms', partial(W, strategy='conv+bn')),
  'W_white': ('W, features scaled to 0.3', partial(W, scale=to_spread(0.3))),
  'W_hbs4': ('W, hyper-batches of 512', None),
  'W_b97': ('W, first moment over 30 steps', None),
  'W_t20': ('W, hyper learning rate 20/steps', partial(W, hlr=20/150)), # digits
  'W_s05': ('W, σ = 0.5', partial(W, sigma=0.5)), 'W_s2': ('W, σ = 2', partial(W, sigma=2.)),
  'W_T1': ('W, a hyper-step after every step', partial(W, T_train=1)),
  'W_pairs': ('W, ε in pairs +ε, -ε', None),
  'gain10': ('bare, features √10 times as long', partial(BARE, scale=times(10**0.5*GAIN))),
  'gain25': ('bare, features 5 times as long', partial(BARE, scale=times(5*GAIN))),
  'bn': ('bare, all batch norms', partial(BARE, strategy='bn')),
  'first_conv': ('bare, first convolution', partial(BARE, strategy='first_conv')),
  'conv': ('bare, all convolutions', partial(BARE, strategy='conv')),
  'conv+bn': ('bare, all convolutions and batch norms', partial(BARE, strategy='conv+bn')),
  's05': ('bare, σ = 0.5', partial(BARE, sigma=0.5)), 's2': ('bare, σ = 2', partial(BARE, sigma=2.)),
  'T1': ('bare, a hyper-step after every step', partial(BARE, T_train=1))}
RUNNABLE = [c for c,(_,make) in CONFIGS.items() if make] # of the others the results are kept, and the code is gone

# --- one run

def effects(x, values):
    "Mean absolute change of pixels (30,) by each entry of the space at its magnitude"
    m = F.pad(values.float(), (0,1))[PBAPolicy().column].tolist()
    centre = torch.rand(len(x), 2, generator=torch.Generator().manual_seed(0))
    def effect(op, m): return (OPS[op](x, torch.full((len(x),), m), centre=centre, fill=FILL)-x).abs().mean().item()
    both = lambda op, m: (effect(op, -m) + effect(op, m))/2 if op in GEOMETRIC else effect(op, m)
    return torch.tensor([both(op, m) for (op,_),m in zip(PBASpace().entries, m)])

def doses(x, lam):
    "Dose of each operation in the policy of λ: by pixel change, and by severity (0 to 1; 1 for those without a magnitude)"
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
    tfms = [Normalize.from_stats(MEAN, STD), FlipCrop(pad, flip=sets is not digits_sets)]
    dls = array_dls(a, b, c, vocab=CLASSES, bs=bs, batch_tfms=tfms)
    learn = Learner(dls, net(), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=wd)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    hba,t = CONFIGS[config][1](seed=seed),time.process_time()
    learn.fit(epochs, lr, cbs=[ParamScheduler({'lr': SchedCos(lr, 0.)}), NoValid(), hba])
    t = time.process_time()-t
    pixel,hard = doses(a[0][:256].float()/255, hba.lam.value.double())
    return dict(shift=shift, seed=seed, pixel=pixel, severity=hard, lam=[round(o, 3) for o in hba.lam.value.tolist()],
                test_error=error_on(learn, learn.dls[2]), cpu_seconds=round(t, 1),
                rate=hba.rate, moments=moments(hba).tolist(),
                points=[[round(v, 2) for v in l.tolist()] for _,l in hba.points[::max(1, epochs//6)]])

def moments(hba):
    "Number, sum and sum of squares (3,H) of the hypergradients"
    g = hba.lam.gradients()
    return torch.stack([torch.full_like(hba.lam.value, len(g)),g.sum(0),(g*g).sum(0)])

def planted(r): return r['shift'].split('+')

def rank(r, kind='pixel'):
    "Place of the planted operation among the doses, 0 for the largest; of two, that of the later one"
    d = r[kind]
    order = sorted(d, key=d.get, reverse=True)
    return max(order.index(o) for o in planted(r))

STARTS = {'default': None, 'bare': None, 'letter': START} # where the searches of these configurations start, see `Space.start`

def write_starts(task):
    "Keep the doses of the policies that searches start from, for the images of each seed: what stands in front without a search"
    seeds = sorted({r['seed'] for c in STARTS for r in read(task, c)})
    images = {s: TASKS[task][0](s)[0][0][:256].float()/255 for s in seeds}
    dose = lambda at, s: doses(images[s], PBASpace().start(at).double())[0]
    lines = [dict(config=c, seed=s, pixel=dose(at, s)) for c,at in STARTS.items() if read(task, c) for s in seeds]
    (OUT/task/'start.jsonl').write_text(''.join(json.dumps({**r, 'environment': environment()})+'\n' for r in lines))

def without_search(task, runs):
    "What the places of each configuration are worth: those of the policy that it starts from, and those by the rise above that"
    starts = {(r['config'],r['seed']): r['pixel'] for r in read(task, 'start')}
    for config in STARTS:
        rs = [r for r in runs[config] if (config,r['seed']) in starts]
        if not rs: continue
        of = [starts[config,r['seed']] for r in rs]
        rise = [{o: v-d[o] for o,v in r['pixel'].items()} for r,d in zip(rs, of)]
        first = lambda ds, k: sum(rank({**r, 'pixel': d})<k for r,d in zip(rs, ds))
        front = len(planted(rs[0]))
        yield (f"The policy that `{config}` starts from, without a search, has the planted operation in front in {first(of, front)} of {len(rs)} "
               f"and among the first three in {first(of, 3)}; by the rise of the dose above it the search has it in front in {first(rise, front)}, "
               f"and among the first three in {first(rise, 3)}.  ")

def read(task, config):
    f = OUT/task/f'{config}.jsonl'
    return [json.loads(l) for l in f.read_text().splitlines()] if f.exists() else []

def signals(rs, what=lambda of: of):
    "`what` of {operation: signal} for the planted operation, and for the others, in the runs that had hypergradients"
    plant,rest = [],[]
    for r in rs:
        n,total,squares = torch.tensor(r['moments'], dtype=torch.float64)
        of = signal(total, squares, PBASpace()) if n.any() else {}
        for o,v in what(of).items(): (plant if o in planted(r) else rest).append(v)
    return np.array(plant),np.array(rest)

ABOUT = {
    'digits': 'digits, 16 pixels, a network of three convolutions, 500 images, 30 epochs (150 hyper-steps without warm-up)',
    'pairs': 'the same, with one operation after the other; the place is that of the later one, top-1 is both in front, top-3 both among the first three',
    'cifar16': 'CIFAR-10 JPEG at 16 pixels, WRN-10-1, 4,000 images, 20 epochs (310 hyper-steps)',
    'cifar': 'CIFAR-10 JPEG, WRN-10-1, 4,000 images, 30 epochs (465 hyper-steps)',
    'long': 'CIFAR-10 JPEG at 16 pixels, WRN-10-1 in bfloat16, 4,000 images, 40 epochs (620 hyper-steps without warm-up)',
    'wrn16': 'CIFAR-10 JPEG, WRN-16-1 in bfloat16, 4,000 images, 40 epochs (620 hyper-steps without warm-up)',
    'wrn16_80': 'the same, 80 epochs (1,240 hyper-steps without warm-up)'}
HEAD = ['configuration','runs','top-1 (95% interval)','top-3 (95% interval)','top-1 by severity',
        'places of the planted operation, per shift',
        'signal: planted, median (others, 95% quantile)',f'signal of {SIGNAL:g} or more: planted, others',
        'named by the report: planted, others','error % on the shifted test set','CPU s']

def signal_cells(rs):
    plant,rest = signals(rs)
    if not len(plant): return 'no gradients','',''
    named,others = signals(rs, lambda of: {o: is_named(of[o], z) for o,z in standing(of).items()} if of else {})
    return (f'{np.median(plant):.1f} ({np.quantile(rest, 0.95):.1f})',
            f'{np.mean(plant>=SIGNAL):.2f}, {np.mean(rest>=SIGNAL):.2f}',f'{named.mean():.2f}, {others.mean():.3f}')

def row(task, config, rs):
    "Cells of one configuration"
    what,make = CONFIGS[config]
    k,n,front = [rank(r)+1 for r in rs],len(rs),len(planted(rs[0]))
    seen = [s for s in TASKS[task][6] if any(r['shift']==s for r in rs)]
    if len(seen)<len(TASKS[task][6]): what += f" ({', '.join(seen)} alone)"
    if make is None: what += ' (its code is gone)'
    share = lambda j: '{:.2f} ({:.2f}, {:.2f})'.format(sum(p<=j for p in k)/n, *wilson(sum(p<=j for p in k), n))
    by = ' '.join(f"{s}:{','.join(str(p) for p,r in zip(k, rs) if r['shift']==s)}" for s in seen)
    severity = f"{np.mean([rank(r, 'severity')<front for r in rs]):.2f}"
    error,seconds = (np.mean([r[o] for r in rs]) for o in ('test_error','cpu_seconds'))
    return [what,n,share(front),share(3),severity,by,*signal_cells(rs),f'{error:.1f}',f'{seconds:.0f}']

def paired(runs):
    "Errors minus those of the default in the same runs, for each form of `sparing`"
    error = lambda c: {(r['shift'],r['seed']): r['test_error'] for r in runs[c]}
    for c in ('sparing','sparing_all'):
        d = [e-error('default')[k] for k,e in error(c).items() if k in error('default')]
        if len(d)>1: yield f"Error with `{c}`, minus that of the default, paired: {{:+.2f}} ± {{:.2f}} ({len(d)} runs).  ".format(*mean_se(d))

def table():
    "All results as Markdown"
    out = []
    for task,about in ABOUT.items():
        if not (OUT/task).exists(): continue
        runs = {c: read(task, c) for c in CONFIGS}
        rows = [row(task, c, rs) for c,rs in runs.items() if len(rs)>=8]
        e = next(rs for rs in runs.values() if rs)[-1]['environment']
        out += [f'**{task}**: {about}; shifts: {", ".join(TASKS[task][6])}.', '']
        out += [f"| {' | '.join(map(str, o))} |" for o in (HEAD, ['---']*len(HEAD), *rows)]
        out += ['', *without_search(task, runs), *paired(runs)]
        out += [f"`{e['command']}` and the like, {e['date']}, torch {e['torch']}, {e['machine']}, one thread per run.", '']
    return '\n'.join(out)

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--task', default='cifar16', choices=list(TASKS))
    ap.add_argument('--configs', nargs='+', default=['default','paper'], choices=RUNNABLE)
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--shifts', nargs='+')
    ap.add_argument('--worker', default='0/1', help='which part of the runs: this process / number of processes')
    ap.add_argument('--table', action='store_true', help='only write the table')
    ap.add_argument('--starts', action='store_true', help='keep the doses of the policies that the searches of the task start from')
    a = ap.parse_args()
    torch.set_num_threads(1)
    k,n = map(int, a.worker.split('/'))
    if a.starts: write_starts(a.task)
    for config in [] if a.table or a.starts else a.configs:
        for sh,s in [(sh,s) for s in a.seeds for sh in a.shifts or TASKS[a.task][6]][k::n]:
            if any(r['shift']==sh and r['seed']==s for r in read(a.task, config)): continue
            r,f = run(a.task, config, sh, s),OUT/a.task/f'{config}.jsonl'
            f.parent.mkdir(parents=True, exist_ok=True)
            with f.open('a') as o: o.write(json.dumps({**r, 'environment': environment()})+'\n')
            top = sorted(r['pixel'], key=r['pixel'].get, reverse=True)[:3]
            dose = {o: round(r['pixel'][o], 3) for o in top}
            print(a.task, config, sh, s, 'place', rank(r)+1, dose, f"{r['test_error']:.1f}%", f"{r['cpu_seconds']:.0f}s", flush=True)
            gc.collect() # a Learner is a cycle that holds its images
    OUT.with_suffix('.md').write_text(table())
