"""What a search costs: time and memory of a fit with HBACallback ÷ the same fit without it, in one run. Time is CPU seconds
on a CPU.

    python benchmarks/surcharge.py [--models wrn-16-2 resnet18] [--device cpu] [--threads 1]

Plain fits and searches of the same few batches alternate, and the ratio is the median over rounds, with its spread; attaching and
detaching are part of a fit. Also a torch.profiler profile of one training step, one transform and one hyper-step, and the peak of
memory (see `peak`). Writes results/surcharge_DEVICE.json and .md.
"""
import argparse
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.optimizer import SGD
from fastcore.foundation import L
from functools import partial
from torchvision.models import resnet18
from common import *
from hba_fastai.search import HBACallback
from hba_fastai.replay import ScheduleCallback
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace

MODELS = { # network, image size, batch
    'wrn-16-2': (lambda: wrn(16,2), 32, 128),
    'resnet18': (lambda: resnet18(num_classes=10), 64, 64),
    'resnet18-32': (lambda: resnet18(num_classes=10), 32, 128)}
STRATEGIES = ['first_bn','first_conv','bn','conv','conv+bn']

def learner(model, batches, device, tfms=()):
    (make,size,bs),g = MODELS[model],torch.Generator().manual_seed(0)
    images = lambda n: torch.randint(0, 256, (n,3,size,size), dtype=torch.uint8, generator=g).to(device)
    data = lambda n: (images(n),torch.randint(0, 10, (n,), generator=g).to(device))
    torch.manual_seed(0)
    learn = Learner(cifar_dls([data(bs*batches),data(2*bs)], bs=bs, extra=tfms, device=device), make(),
                    opt_func=partial(SGD, mom=0.9))
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    return learn

def seconds(learn, cbs=None, sync=lambda: None):
    "Of one fit"
    sync(); t = clock()
    learn.fit(1, 1e-3, cbs=[NoValid(), *L(cbs)])
    sync(); return clock()-t

def ratios(model, rounds, batches, device, whole):
    "Ratio of the times for each strategy and for the replay, and the shares of a search; two rounds for all but the default strategy"
    sync = torch.cuda.synchronize if device=='cuda' else lambda: None
    learn = learner(model, batches, device)
    start = Schedule([0.], PBASpace().values(PBASpace().start(0.05))[None])
    search = lambda *a, **k: lambda: HBACallback(*a, seed=0, warmup=0., **k)
    main = {'plain again': lambda: None, 'first_bn': search()}
    if whole: main['the default: first_bn, λ is frozen in the first 30%'] = lambda: HBACallback(seed=0)
    arms = main if whole else {**main, **{s: search(s) for s in STRATEGIES[1:]},
                               'first_bn, conditioned on λ': search(condition='lambda'),
                               'replay': lambda: ScheduleCallback(start, seed=0)}
    seconds(learn); seconds(learn, HBACallback(seed=0)) # warm up
    rows = {k: [] for k in arms}
    for r in range(rounds):
        a = seconds(learn, sync=sync)
        for k,cb in arms.items():
            if r>=2 and k not in main: continue
            b,c = seconds(learn, cb(), sync),seconds(learn, sync=sync)
            rows[k].append(2*b/(a+c)) # between two plain fits, so that a drift of the machine cancels
            a = c
    total,transform,steps,hyper = parts(model, batches, device, sync)
    n = batches//HBACallback().T_train
    spread = lambda v: dict(ratio=float(np.median(v)), low=min(v), high=max(v), rounds=len(v))
    return dict(ratios={k: spread(v) for k,v in rows.items()},
                share_of_search=dict(transform=transform/total, forward_backward_step=steps/total, hyper_step=hyper/total),
                steps=batches, hyper_steps=n,
                hyper_step_in_training_steps=(hyper/n)/(steps/batches))

def parts(model, batches, device, sync):
    "Seconds of a search, and of its transforms, training steps and hyper-steps"
    probes = transform,step,hyper = [Seconds(sync) for _ in range(3)]
    learn = learner(model, batches, device, around_policy(transform))
    seconds(learn) # warm up
    transform.took.clear()
    return [seconds(learn, [*around_step(step), Watched(hyper)], sync), *(sum(p.took) for p in probes)]

class Profiler:
    "A probe: the `torch.profiler.profile` of part number `at`"
    def __init__(self, at, device):
        P = torch.profiler
        self.at,self.n = at,0
        self.p = P.profile(activities=[P.ProfilerActivity.CPU, *([P.ProfilerActivity.CUDA] if device=='cuda' else [])])
    def begin(self):
        self.n += 1
        if self.n==self.at: self.p.start()
    def end(self):
        if self.n==self.at: self.p.stop()

def longest(prof, device, n=9):
    "The calls with the most time of their own, in parts of all"
    own = (lambda e: e.self_device_time_total) if device=='cuda' else (lambda e: e.self_cpu_time_total)
    es = sorted(prof.key_averages(), key=own, reverse=True)
    total = sum(map(own, es))
    return dict(total_ms=total/1000, top=[[e.key, own(e)/total, e.count] for e in es[:n]])

def profile(model, device):
    "Where the time of one training step, of the transform of its batch and of one hyper-step goes"
    probes = step,transform,hyper = Profiler(6, device),Profiler(6, device),Profiler(3, device)
    seconds(learner(model, 8, device, around_policy(transform)), [*around_step(step), Watched(hyper)])
    names = 'training step (forward, backward, optimizer)','policy transform','hyper-step'
    return {k: longest(o.p, device) for k,o in zip(names, probes)}

class Held:
    "A probe: the most bytes that tensors kept for a backward pass hold within a part"
    def __init__(self): self.held,self.most = {},0
    def keep(self, t):
        s = t.untyped_storage()
        self.held[s.data_ptr()] = s.nbytes()
        return t
    def begin(self): self.held.clear()
    def end(self): self.most = max(self.most, sum(self.held.values()))

def peak(model, strategy, batches, device):
    """MiB of one fit at its peak: allocated on the GPU; on a CPU, where the memory of a process is mostly noise of the allocator,
    the tensors kept for one backward pass (weights among them), gradients and momentum"""
    learn,held = learner(model, batches, device),Held()
    cbs = [*around_step(held), *([Watched(held, strategy)] if strategy!='plain' else [])]
    if device=='cuda':
        torch.cuda.reset_peak_memory_stats()
        seconds(learn, cbs)
        return torch.cuda.max_memory_allocated()/2**20
    with torch.autograd.graph.saved_tensors_hooks(held.keep, lambda t: t): seconds(learn, cbs)
    return (held.most + 2*sum(p.numel()*p.element_size() for p in learn.model.parameters()))/2**20

def rows_of(model, r):
    "Lines of the table of one model"
    rows = [f'**{model}**, images of {MODELS[model][1]} pixels, batch {MODELS[model][2]}', '',
            '| fit | time ÷ plain (lowest, highest; rounds) | memory ÷ plain |','| --- | --- | --- |']
    for k,v in r['ratios'].items():
        mem = r.get('memory', {}).get(k)
        memory = f"{mem/r['memory']['plain']:.2f}" if mem else ''
        rows.append(f"| {k} | {v['ratio']:.2f} ({v['low']:.2f}, {v['high']:.2f}; {v['rounds']}) | {memory} |")
    s = r['share_of_search']
    rows += ['', f"Of a search with first_bn the policy transform takes {s['transform']:.1%}, "
                 f"forward, backward and optimizer {s['forward_backward_step']:.1%}, the hyper-steps {s['hyper_step']:.1%}; "
                 f"a hyper-step takes {r['hyper_step_in_training_steps']:.2f} of a training step."]
    if 'profile' in r: rows += ['', '| profile of one | ms | of which |', '| --- | --- | --- |']
    for k,v in r.get('profile', {}).items():
        rows.append(f"| {k} | {v['total_ms']:.1f} | {', '.join(f'{n} {t:.0%} ({c})' for n,t,c in v['top'])} |")
    return [*rows, '']

def table(d): return '\n'.join([*(l for m,r in d['models'].items() for l in rows_of(m, r)), footer(d['environment']), ''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--models', nargs='+', default=['wrn-16-2','resnet18'], choices=list(MODELS))
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--batches', type=int, default=12)
    ap.add_argument('--whole', action='store_true', help='only the default, with so many batches that the rest of λ at the start counts '
                    'as in a whole fit; to results/surcharge_whole_DEVICE')
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    d = dict(models={}, rounds=a.rounds, batches=a.batches)
    for m in a.models:
        d['models'][m] = ratios(m, a.rounds, a.batches, a.device, a.whole)
        if a.whole: continue
        d['models'][m]['profile'] = profile(m, a.device)
        d['models'][m]['memory'] = {s: peak(m, s, 2, a.device) for s in ['plain',*STRATEGIES]}
    d['environment'] = environment()
    out = RESULTS/f"surcharge_{'whole_' if a.whole else ''}{a.device}.json"
    save_json(out, d)
    out.with_suffix('.md').write_text(table(d))
    print(table(d))
