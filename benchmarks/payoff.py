"""What does a search pay, beside all else that a handful of labelled target images can be used for?

    python benchmarks/payoff.py --seeds 0 1 2 --steps 900 300 --targets 100 30 300    # runs what is missing, then writes the table
    python benchmarks/payoff.py --table                                               # writes results/payoff.md

The digits of scikit-learn at 16 pixels: 500 source images as they are; 30 to 300 target images and 997 unseen test images under a shift of `SHIFTS`;
a network of three convolutions, batches of 50, SGD with one cycle. Every arm of `ARMS` is one way to use the source and the target images.
Strengths of the shifts and rates of the fine-tuning were chosen on seed 100.

results/payoff/digits.jsonl holds one line per arm, and one with the environment where a process began:
    task, steps, shift, seed, arm   what was run; `steps` are those of the training on the source images
    drawn                           'batch' where TrivialAugmentWide is this package's; without, it was torchvision's, image by image
    n_target                        number of labelled target images, 0 for an arm that uses none
    error, source_error             error in percent on the test images with the shift and without it
    cpu_seconds                     CPU seconds of one thread, without the training or the search that the arm goes on from
"""
import argparse,copy,gc,io,json,math,time
from functools import lru_cache,partial
from itertools import product
import numpy as np
import torch
from PIL import Image
from torch import nn
import torch.nn.functional as F
from torchvision.transforms import v2
from fastai.callback.progress import ProgressCallback
from fastai.callback.schedule import Learner,combined_cos # `Learner` with `fit_one_cycle`
from fastai.optimizer import SGD
from fastai.torch_core import set_seed
from fastai.vision.augment import Normalize
from common import RESULTS,NoValid,environment,made_by,mean_se,quiet
from hba_fastai.all import HBACallback,OPS,PBAPolicy,PolicyCallback,Schedule,ScheduleCallback,TrivialAugmentWide,array_dls
from hba_fastai.data import digits
from hba_fastai.session import digits_net
from hba_fastai.space import GEOMETRIC,PBASpace
from hba_fastai.transform import population

OUT = RESULTS/'payoff'
BS,LR,WD = 50,0.05,5e-4
MEAN,STD = [0.3]*3,[0.37]*3

# --- shifts: float images (N,3,16,16) in [0,1], generator -> the same shifted

def between(lo, hi, n, g): return torch.rand(n, generator=g)*(hi-lo)+lo
def each(v): return v[:,None,None,None]

def op(name, lo=0., hi=0., share=1.):
    "An operation on a share of the images, at a magnitude drawn for each; geometric ones to either side"
    def f(x, g):
        n = len(x)
        m,centre = between(lo, hi, n, g),torch.rand(n, 2, generator=g)
        on,sign = torch.rand(n, generator=g)<share,torch.rand(n, generator=g)<0.5
        if name in GEOMETRIC: m = torch.where(sign, m, -m)
        return torch.where(each(on), OPS[name](x, m, centre=centre, fill=torch.zeros(3)), x)
    return f

def chain(*fs):
    def f(x, g):
        for o in fs: x = o(x, g)
        return x
    return f

def noise(x, g): return x + 0.35*torch.randn(x.shape, generator=g)

def defocus(x, g, r=2.2):
    "The mean over a disk of radius `r`"
    k = math.ceil(r)
    d = torch.cartesian_prod(*[torch.arange(-k, k+1.)]*2).norm(dim=1).view(2*k+1, 2*k+1)
    disk = (r+0.5-d).clamp(0, 1)
    return F.conv2d(F.pad(x, (k,)*4, mode='reflect').flatten(0,1)[:,None], (disk/disk.sum())[None,None]).view_as(x)

def jpeg(x, g, quality=2):
    def one(o):
        f = io.BytesIO()
        Image.fromarray((o.permute(1,2,0)*255).byte().numpy()).save(f, 'JPEG', quality=quality)
        return torch.from_numpy(np.array(Image.open(f))).permute(2,0,1)/255
    return torch.stack([one(o) for o in x])

def fog(x, g):
    "A bright, uneven veil"
    veil = F.interpolate(torch.rand(len(x), 1, 4, 4, generator=g), 16, mode='bicubic', align_corners=False).clamp(0, 1)/2 + 0.5
    return x.lerp(veil.expand_as(x), each(between(0.5, 0.85, len(x), g)))

def cast(x, g):
    "A wrong white balance"
    gain,offset = (torch.tensor(o)[:,None,None] for o in ([0.45,0.75,0.9], [0.45,0.1,0.]))
    return x*gain + offset

def scanner(x, g):
    "Another device: smaller digits, thicker strokes, grey ink, light from one side, noise"
    n,zoom = len(x),1/between(0.6, 0.8, len(x), g)
    theta = F.pad(torch.eye(2)*zoom[:,None,None], (0,1))
    x = F.grid_sample(x, F.affine_grid(theta, x.shape, align_corners=False), align_corners=False)
    x = F.max_pool2d(x, 2, 1, padding=1)[...,:-1,:-1]
    light = torch.linspace(0, 0.5, 16)*each(between(-0.4, 0.4, n, g))
    return x**0.6*0.75 + 0.15 + light + 0.08*torch.randn(x.shape, generator=g)

SINGLE = {'Invert': op('Invert', share=0.5), 'Rotate': op('Rotate', 0, 30), 'Contrast': op('Contrast', 0.12, 0.37),
          'TranslateX': op('TranslateX', 0, 0.3), 'Brightness': op('Brightness', 0.1, 0.4), 'ShearX': op('ShearX', 0, 0.3),
          'TranslateY': op('TranslateY', 0, 0.3), 'ShearY': op('ShearY', 0, 0.3), 'Solarize': op('Solarize', 64, 192, share=0.5),
          'Posterize': op('Posterize', 5, 7), 'Sharpness': op('Sharpness', 0.1, 0.4), 'Cutout': op('Cutout', 0.2, 0.4)}
PAIRS = {'Contrast+Rotate': chain(SINGLE['Contrast'], SINGLE['Rotate']), 'Invert+TranslateX': chain(SINGLE['TranslateX'], SINGLE['Invert']),
         'Brightness+ShearX': chain(SINGLE['Brightness'], SINGLE['ShearX']),
         'Rotate+TranslateY': chain(SINGLE['Rotate'], SINGLE['TranslateY'])}
OUTSIDE = dict(noise=noise, defocus=defocus, jpeg=jpeg, fog=fog, cast=cast, scanner=scanner)
GROUPS = {'one operation': SINGLE, 'two operations': PAIRS, 'outside of the space': OUTSIDE}
SHIFTS = {**SINGLE, **PAIRS, **OUTSIDE}

def shifted(data, shift, seed):
    "Bytes and labels under a shift"
    x,y = data
    return (SHIFTS[shift](x.float()/255, torch.Generator().manual_seed(seed)).clamp(0, 1)*255).round().byte(),y

# --- policies: bytes, progress, generator -> augmented bytes

def crop(x, pct, g):
    "Each image moved by up to one pixel"
    dy,dx = torch.randint(0, 3, (2,len(x),1,1), generator=g)
    i = (torch.arange(16)[:,None]+dy)*18 + torch.arange(16)+dx
    return F.pad(x, (1,)*4).flatten(2).gather(2, i.flatten(1)[:,None].expand(-1, 3, -1)).view_as(x)

class PerImage:
    "A transform of torchvision, drawn for each image"
    def __init__(self, f): self.f = f
    def __call__(self, x, pct, g): return torch.stack([self.f(o) for o in x])

class Free:
    "A policy without hyperparameters, as `PolicyCallback` applies it"
    def __init__(self, policy): self.policy = policy
    def __call__(self, x, pct, g): return self.policy(x, torch.zeros(len(x), 0), g)

class Replay:
    "A `Schedule`, as `ScheduleCallback` applies it"
    def __init__(self, schedule): self.schedule,self.policy = schedule,PBAPolicy(fill=MEAN)
    def __call__(self, x, pct, g):
        lam = population(self.schedule.lam(pct), self.schedule.sigma, len(x), g, self.policy.active)
        return self.policy(x, lam, g)

def start_values(): return Schedule([0.], PBASpace().values(PBASpace().start().double())[None])

POLICIES = {'nothing': lambda: None, 'crop': lambda: crop, 'start': lambda: Replay(start_values()),
            'trivial': lambda: Free(TrivialAugmentWide(fill=0.)), 'augmix': lambda: PerImage(v2.AugMix())}

# --- networks and training

class Pixels(nn.Module):
    "Bytes to what the network takes: normalised by the data's statistics, or each image by its own"
    def __init__(self, per_image=False):
        super().__init__()
        self.per_image = per_image
        self.mean,self.std = (torch.tensor(o)[:,None,None] for o in (MEAN,STD))
    def forward(self, x):
        x = x.float()/255
        if not self.per_image: return (x-self.mean)/self.std
        std,mean = torch.std_mean(x, (1,2,3), keepdim=True)
        return (x-mean)/(std+1e-3)

def endless(n, g):
    while True: yield from torch.randperm(n, generator=g).tolist()

def taken(data, order, k):
    i = [next(order) for _ in range(k)]
    return data[0][i],data[1][i]

def optimizer(model, lr):
    "SGD with momentum; biases and batch norms do not decay, as in fastai"
    decay,rest = [],[]
    for p in model.parameters(): (decay if p.dim()>1 else rest).append(p)
    return torch.optim.SGD([dict(params=decay, weight_decay=WD), dict(params=rest)], lr=lr, momentum=0.9)

def step(model, opt, x, y, **hypers):
    for g in opt.param_groups: g.update(hypers)
    F.cross_entropy(model(x), y).backward()
    opt.step()
    opt.zero_grad()

def train(source, steps, seed, policy=None, target=None, since=0., per_image=False):
    "One training on the source images; from `since` on, half of each batch are target images, under the same policy"
    set_seed(seed)
    model = nn.Sequential(Pixels(per_image), digits_net())
    opt,g = optimizer(model, LR),torch.Generator().manual_seed(seed)
    sources,targets = endless(len(source[1]), g),endless(len(target[1]), g) if target else None
    lr,mom = combined_cos(0.25, LR/25, LR, LR/1e5),combined_cos(0.25, 0.95, 0.85, 0.95)
    augment = policy or (lambda x, pct, g: x)
    for i in range(steps):
        pct = i/steps
        k = BS//2 if target and pct>=since else 0
        x,y = taken(source, sources, BS-k)
        if k:
            xt,yt = taken(target, targets, k)
            x,y = torch.cat([x, xt]),torch.cat([y, yt])
        step(model, opt, augment(x, pct, g), y, lr=lr(pct), momentum=mom(pct))
    return model.eval()

def in_package(source, target, steps, seed, callback=None):
    "One fit with `callback(loader of the target images)` -> (network, the callback)"
    set_seed(seed)
    dls = array_dls(source, target, vocab=[str(o) for o in range(10)], bs=BS, batch_tfms=Normalize.from_stats(MEAN, STD))
    learn = Learner(dls, digits_net(), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=WD)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    cb = callback and callback(dls.valid)
    learn.fit_one_cycle(max(steps*BS//len(source[1]), 1), LR, cbs=[NoValid(), *[cb]*bool(cb)])
    return nn.Sequential(Pixels(), learn.model).eval(),cb

def statistics_of(net, x):
    "`net` with the batch statistics of `x`"
    net = copy.deepcopy(net).train()
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 1.
    with torch.no_grad(): net(x)
    return net.eval()

FIRST_BLOCK,LAST_LAYER = (lambda net: net[1][0]),(lambda net: net[1][-1])

def fine_tuned(net, target, seed, lr=0.03, passes=30, part=lambda net: net):
    "`net` trained on: `part` of it, the rest in eval mode"
    net = copy.deepcopy(net).eval()
    part(net).train()
    n,g = len(target[1]),torch.Generator().manual_seed(seed)
    bs = min(BS, n)
    opt,order,steps = optimizer(part(net), lr),endless(n, g),passes*n//bs
    for i in range(steps): step(net, opt, *taken(target, order, bs), lr=lr*(1+math.cos(math.pi*i/steps))/2)
    return net.eval()

def tuned(net, target, seed, rates=(0.01,0.03,0.1), passes=(30,100)):
    "Fine-tuned as a careful user would: rate and number of passes are those that do best from one half of the target images to the other"
    n = len(target[1])//2
    a,b = (tuple(o[i] for o in target) for i in (slice(n), slice(n,None)))
    best = min(product(rates, passes), key=lambda o: judge(fine_tuned(net, a, seed, *o), b))
    return fine_tuned(net, target, seed, *best)

def judge(net, data):
    "Error in percent and loss"
    with torch.no_grad(): p = net(data[0])
    return 100*(p.argmax(1)!=data[1]).float().mean().item(),F.cross_entropy(p, data[1]).item()

# --- arms

@lru_cache
def sets(seed):
    "500 source, 300 target and 997 test images"
    x,y = digits()
    i = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split([500,300,997])
    return [(x[j],y[j]) for j in i]

@lru_cache(20)
def alone(arm, steps, seed):
    "A training that knows of no shift -> (network, its CPU seconds), once for all shifts"
    t = time.process_time()
    net = train(sets(seed)[0], steps, seed+1000, POLICIES.get(arm, POLICIES['nothing'])(), per_image=arm=='standardised')
    return net,time.process_time()-t

class Cell:
    "What the arms of one shift, seed, number of target images and steps share"
    def __init__(self, steps, shift, seed, n):
        source,target,test = sets(seed)
        self.steps,self.seed,self.source,self.test,self.found = steps,seed,source,test,None
        self.target = tuple(o[:n] for o in shifted(target, shift, 1000*seed+1))
        self.moved_source,self.moved_test = shifted(source, shift, 1000*seed+2),shifted(test, shift, 1000*seed+3)
        self.plain = alone('nothing', steps, seed)[0]

    def train(self, policy=None, **kwargs):
        "From other weights than the search's"
        return train(**{'source': self.source, 'steps': self.steps, 'seed': self.seed+1000, 'policy': policy, **kwargs})
    def mixed(self, policy='nothing', **kwargs): return self.train(POLICIES[policy](), target=self.target, **kwargs)
    def tune(self, f=fine_tuned, **kwargs): return f(self.plain, self.target, self.seed, **kwargs)
    def one_fit(self, **kwargs):
        net,hba = in_package(self.source, self.target, self.steps, self.seed, lambda dl: HBACallback(target=dl, seed=self.seed, **kwargs))
        if not kwargs: self.found = hba.schedule
        return net
    def late_mixing(self, policy):
        "The same program and weights as `one_fit`, without a search"
        return in_package(self.source, self.target, self.steps, self.seed, lambda dl: PolicyCallback(policy, target=dl, seed=self.seed))[0]
    def reuse(self):
        if self.found is None: self.one_fit()
        seed = self.seed+1000
        return in_package(self.source, self.target, self.steps, seed, lambda dl: ScheduleCallback(self.found, target=dl, seed=seed))[0]

ALONE = {'nothing': 'no augmentation', 'crop': 'crop', 'trivial': 'TrivialAugmentWide', 'start': 'policy at the start values of the search', 'augmix': 'AugMix',
         'standardised': 'each image standardised'}
WITH_TARGET = { # arm: (what, Cell -> network)
  'statistics': ('batch statistics of the target images (no labels)', lambda c: statistics_of(c.plain, c.target[0])),
  'fine_tuned': ('fine-tuned, all layers', lambda c: c.tune()),
  'first_block': ('fine-tuned, first block', lambda c: c.tune(part=FIRST_BLOCK, lr=0.01)),
  'last_layer': ('fine-tuned, last layer', lambda c: c.tune(part=LAST_LAYER, lr=0.1)),
  'tuned': ('fine-tuned, rate and passes chosen on half of the target images', lambda c: c.tune(tuned)),
  'mixed': ('target images in half of each batch', lambda c: c.mixed()),
  'mixed_trivial': ('target images in half of each batch, all under TrivialAugment', lambda c: c.mixed('trivial')),
  'mixed_start': ('target images in half of each batch, all under the start policy', lambda c: c.mixed('start')),
  'late': ('target images in half of each batch from 60%', lambda c: c.mixed(since=0.6)),
  'late_trivial': ('target images in half of each batch from 60%, all under TrivialAugment', lambda c: c.mixed('trivial', since=0.6)),
  'late_start': ('target images in half of each batch from 60%, all under the start policy', lambda c: c.mixed('start', since=0.6)),
  'late_mixing': ('`PolicyCallback(PBAPolicy(), target=...)`: the same, as the package has it', lambda c: c.late_mixing(PBAPolicy())),
  'late_mixing_trivial': ('`PolicyCallback(TrivialAugmentWide(), target=...)`', lambda c: c.late_mixing(TrivialAugmentWide())),
  'one_fit': ('**`HBACallback(target=...)`**, one fit', lambda c: c.one_fit()),
  'reuse': ('**`ScheduleCallback(schedule, target=...)`**, the schedule of that fit', lambda c: c.reuse()),
  'sparing': ('the same fit with `sparing=True`', lambda c: c.one_fit(sparing=True)),
  'oracle': ('all source images under the shift', lambda c: c.train(source=c.moved_source)),
  'oracle_fit': ('the same, with the program and the weights of `one_fit`', lambda c: in_package(c.moved_source, c.target, c.steps, c.seed)[0])}
ORACLES = ['oracle','oracle_fit']
ARMS = {**ALONE, **{k: what for k,(what,_) in WITH_TARGET.items()}}
OURS = ['one_fit','reuse','sparing']
RIVALS = [a for a in ARMS if a not in (*OURS,*ORACLES)]

def run(cell, arm):
    "Errors and seconds of one arm"
    t = time.process_time()
    if arm in ALONE: net,t = alone(arm, cell.steps, cell.seed)
    else: net,t = WITH_TARGET[arm][1](cell),time.process_time()-t
    drawn = {'drawn': 'batch'} if 'trivial' in arm else {} # runs before had torchvision's transform, image by image
    return dict(error=judge(net, cell.moved_test)[0], source_error=judge(net, cell.test)[0], cpu_seconds=round(t, 2), **drawn)

# --- results

FILE = OUT/'digits.jsonl'

def lines(): return [json.loads(l) for l in FILE.read_text().splitlines()] if FILE.exists() else []
def runs(): return {key(r): r for r in lines() if 'arm' in r}
def key(r): return r['steps'],r['n_target'],r['shift'],r['seed'],r['arm']
def write(r):
    OUT.mkdir(parents=True, exist_ok=True)
    with FILE.open('a') as f: f.write(json.dumps(r)+'\n')

def pm(v, sign=''): return f'{{:{sign}.1f}} ± {{:.1f}} ({len(v)})'.format(*mean_se(v)) if len(v)>1 else f'{v[0]:{sign}.1f} (1)' if v else ''

def errors(rs, steps, n, shift, arm, what='error'):
    "`{seed: error}`; an arm without target images is the same for each number of them, and so are the oracles"
    of = lambda nt: arm in ORACLES or nt==(0 if arm in ALONE else n)
    return {s: r[what] for (st,nt,sh,s,a),r in rs.items() if (st,sh,a)==(steps,shift,arm) and of(nt)}

def head(*cols): return [f"| {' | '.join(cols)} |", '| --- '*len(cols)+'|']

def arms_table(rs, steps, n, shifts):
    "One row per arm, one column per shift; the last ones are means over the shifts that have the arm"
    out = head('training', *shifts, 'mean', 'without the shift', 'CPU s')
    for arm,what in ARMS.items():
        e = {s: list(errors(rs, steps, n, s, arm).values()) for s in shifts}
        if not any(e.values()): continue
        mean = lambda k: np.mean([v for s in shifts for v in errors(rs, steps, n, s, arm, k).values()])
        over = np.mean([np.mean(v) for v in e.values() if v])
        out.append(f"| {what} | {' | '.join(pm(e[s]) for s in shifts)} | {over:.1f} | {mean('source_error'):.1f} | {mean('cpu_seconds'):.1f} |")
    return out

def difference(a, b): return [a[s]-b[s] for s in sorted(a.keys() & b.keys())]

def best_rival(rs, steps, n, shift):
    "The arm other than ours and the oracles whose error is lowest beside that of `one_fit`, by the seeds that both have; of two seeds or more, where there are"
    ours = errors(rs, steps, n, shift, 'one_fit')
    d = {a: difference(errors(rs, steps, n, shift, a), ours) for a in RIVALS}
    least = min(2, max(map(len, d.values())))
    return min((a for a in RIVALS if len(d[a])>=least), key=lambda a: np.mean(d[a]))

def n_rivals(rs, steps, n): return sum(any(errors(rs, steps, n, s, a) for s in SHIFTS) for a in RIVALS)

def differences_table(rs, steps, n):
    "Per shift: what the best rival is, and the paired difference of ours from it; per group the mean over its shifts, with the standard error over them"
    arms = [a for a in (*OURS,'oracle_fit') if any(errors(rs, steps, n, s, a) for s in SHIFTS)]
    out = head('shift', 'best rival', 'its error %', *[f'{a} − it' for a in arms])
    for name,shifts in GROUPS.items():
        over = []
        for shift in [s for s in shifts if errors(rs, steps, n, s, 'one_fit')]:
            rival = best_rival(rs, steps, n, shift)
            e = errors(rs, steps, n, shift, rival)
            d = [difference(errors(rs, steps, n, shift, a), e) for a in arms]
            if all(d): over.append([np.mean(o) for o in (list(e.values()),*d)])
            out.append(f"| {shift} | {rival} | {pm(list(e.values()))} | {' | '.join(pm(o, '+') for o in d)} |")
        if len(over)>1: out.append(f"| *mean: {name}* | | {' | '.join(pm(list(c), '+' if i else '') for i,c in enumerate(zip(*over)))} |")
    return out

def gap_closed(rs, steps, n, arm, shifts) -> list:
    "(nothing − arm, nothing − oracle_fit) of each shift: sums over its seeds whose gap is 5 points or more"
    out = []
    for shift in shifts:
        nothing,oracle,ours = (errors(rs, steps, n, shift, a) for a in ('nothing','oracle_fit',arm))
        gaps = [(nothing[s]-ours[s], nothing[s]-oracle[s]) for s in nothing.keys() & oracle.keys() & ours.keys() if nothing[s]-oracle[s]>=5]
        out += [np.sum(gaps, 0)]*bool(gaps)
    return out

def interval(pairs, k=2000):
    "Ratio of the sums, and its 95% interval by bootstrap over the pairs; '' without any"
    if not pairs: return ''
    a,i = np.array(pairs),np.random.default_rng(0).integers(0, len(pairs), (k,len(pairs)))
    low,high = np.quantile(a[i,0].sum(1)/a[i,1].sum(1), [0.025,0.975])
    return f'{a[:,0].sum()/a[:,1].sum():.2f} ({low:.2f} to {high:.2f})'

def pooled_table(rs, steps, n):
    "Over shifts: differences from one rival that is the same for all, and from the best of each; and the share of the gap to the oracle that is closed"
    out = head('shifts', 'arm', 'cells', 'against one_fit, points', 'against late_mixing', 'against the best rival of each shift',
               'shifts behind that by more than 2 SE and 1 point', 'of the gap to the oracle closed (95%, over shifts)', 'the same of late_mixing')
    for name,shifts in {'in reach of the operations': {**SINGLE, **PAIRS}, 'out of reach': OUTSIDE, 'all': SHIFTS}.items():
        for arm in OURS:
            seen = [s for s in shifts if errors(rs, steps, n, s, arm) and errors(rs, steps, n, s, 'one_fit')] # which names the rivals
            against = lambda rival: [difference(errors(rs, steps, n, s, arm), errors(rs, steps, n, s, rival(s))) for s in seen]
            best,late,default = against(lambda s: best_rival(rs, steps, n, s)),against(lambda s: 'late_mixing'),against(lambda s: 'one_fit')
            if not seen or not all(best) or not all(late): continue
            far = lambda o: len(o)>1 and mean_se(o)[0]>max(1, 2*mean_se(o)[1])
            behind = ', '.join(s for s,o in zip(seen, best) if far(o)) or 'none'
            means = [pm([np.mean(o) for o in d], '+') if d is not default or arm!='one_fit' else '' for d in (default,late,best)]
            gaps = [interval(gap_closed(rs, steps, n, a, seen)) for a in (arm,'late_mixing')]
            out.append(f"| {name} | {arm} | {sum(map(len, best))} | {' | '.join(means)} | {behind} | {' | '.join(gaps)} |")
    return out

def table():
    "All results as Markdown"
    rs = runs()
    out = ['Error in percent on 997 digits under a shift: mean ± standard error over seeds (number of seeds). One image is 0.1%. '
           'The best rival is chosen by the test error itself, which favours it; a difference below 0 speaks for HBA. '
           '`late_mixing` is `one_fit` without a search, by the same program, with the same weights and seed; `late_start` the same idea in a loop of its own: '
           'other weights, and target images that are not drawn in proportion to their classes.', '']
    if any('trivial' in k[-1] and 'drawn' not in r for k,r in rs.items()):
        out += ["TrivialAugment is torchvision's, drawn image by image, in the lines without `drawn`, and this package's in the others.", '']
    for n,steps in sorted({(n,steps) for steps,n,*_ in rs if n}, key=lambda o: (o[0]!=100,o[0],-o[1])):
        if not any(errors(rs, steps, n, s, 'one_fit') for s in SHIFTS): continue
        out += [f'## {n} target images, {steps} steps', '', f'{n_rivals(rs, steps, n)} rivals.', '']
        out += [*pooled_table(rs, steps, n), '', *differences_table(rs, steps, n), '']
        for name,shifts in GROUPS.items():
            seen = [s for s in shifts if errors(rs, steps, n, s, 'one_fit')]
            if seen: out += [f'**Shifts: {name}**', '', *arms_table(rs, steps, n, seen), '']
    e = [l['environment'] for l in lines() if 'environment' in l]
    out += made_by(e)
    return '\n'.join(out)

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--seeds', type=int, nargs='+', default=[0,1,2])
    ap.add_argument('--steps', type=int, nargs='+', default=[900,300])
    ap.add_argument('--targets', type=int, nargs='+', default=[100,30,300])
    ap.add_argument('--shifts', nargs='+', default=list(SHIFTS), choices=list(SHIFTS))
    ap.add_argument('--arms', nargs='+', default=list(ARMS), choices=list(ARMS))
    ap.add_argument('--quick', action='store_true', help='twenty steps, nothing is written')
    ap.add_argument('--table', action='store_true', help='only write the table')
    a = ap.parse_args()
    torch.set_num_threads(1)
    if not a.table and not a.quick: write(dict(environment=environment()))
    done = {} if a.quick else runs()
    for n,steps,seed,shift in [] if a.table else product(a.targets, [20] if a.quick else a.steps, a.seeds, a.shifts):
        wanted = [dict(task='digits', steps=steps, n_target=0 if arm in ALONE else n, shift=shift, seed=seed, arm=arm) for arm in a.arms]
        missing = [r for r in wanted if key(r) not in done]
        cell = Cell(steps, shift, seed, n) if missing else None
        for r in missing:
            r |= run(cell, r['arm'])
            print(r, flush=True)
            if not a.quick: write(r)
        gc.collect() # a Learner is a cycle that holds its images
        if missing and not a.quick: OUT.with_suffix('.md').write_text(table())
    if not a.quick: OUT.with_suffix('.md').write_text(table())
