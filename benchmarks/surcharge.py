"""What a search costs: time and memory of a fit with HBACallback ÷ the same fit without it, in one run. Time is CPU seconds on a CPU.

    python benchmarks/surcharge.py [--models wrn-16-2 resnet18] [--device cpu] [--threads 1]

Plain fits and searches of the same few batches alternate, and the ratio is the median over rounds, with its spread; attaching and detaching are part of a fit. Also a torch.profiler
profile of one training step, one transform and one hyper-step, and the peak of memory (see `peak`). Writes results/surcharge_DEVICE.json and .md.
"""
import argparse,itertools,time
from contextlib import contextmanager
import torch
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.optimizer import SGD
from functools import partial
from common import *
from hba_fastai.search import HBACallback,ScheduleCallback,PolicyTransform
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace

MODELS = {'wrn-16-2': (lambda: wrn(16,2), 32, 128), 'resnet18': (None, 64, 64)} # network, image size, batch
STRATEGIES = ['first_bn','first_conv','bn','conv','conv+bn']

def learner(model, batches, device):
    make,size,bs = MODELS[model]
    from torchvision.models import resnet18
    n,g = bs*batches,torch.Generator().manual_seed(0)
    data = lambda n: (torch.randint(0, 256, (n,3,size,size), dtype=torch.uint8, generator=g).to(device),torch.randint(0, 10, (n,), generator=g).to(device))
    torch.manual_seed(0)
    learn = Learner(cifar_dls([data(n),data(2*bs)], bs=bs, device=device), make() if make else resnet18(num_classes=10), opt_func=partial(SGD, mom=0.9))
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    return learn

@contextmanager
def timed(cls, name, sync):
    "The seconds of each call of a method"
    took = []
    def call(f, *a, **k):
        sync(); t = clock()
        try: return f(*a, **k)
        finally: sync(); took.append(clock()-t)
    with around(cls, name, call): yield took

clock = time.perf_counter if torch.cuda.is_available() else time.process_time # CPU seconds: another machine on the same host takes nothing from them

def seconds(learn, cb=None, sync=lambda: None):
    sync(); t = clock()
    learn.fit(1, 1e-3, cbs=[NoValid(), *([cb] if cb else [])])
    sync(); return clock()-t

def ratios(model, rounds, batches, device, whole):
    "Ratio of the times for each strategy and for the replay, and the shares of a search; two rounds for all but the default strategy"
    sync = torch.cuda.synchronize if device=='cuda' else lambda: None
    learn = learner(model, batches, device)
    start = Schedule([0.], PBASpace().values(PBASpace().start(0.05))[None])
    search = lambda *a, **k: lambda: HBACallback(*a, seed=0, warmup=0., **k)
    main = {'plain again': lambda: None, 'first_bn': search()}
    if whole: main['the default: first_bn, λ rests in the first 30%'] = lambda: HBACallback(seed=0)
    arms = main if whole else {**main, **{s: search(s) for s in STRATEGIES[1:]}, 'first_bn, conditioned on λ': search(condition='lambda'), 'replay': lambda: ScheduleCallback(start, seed=0)}
    seconds(learn); seconds(learn, HBACallback(seed=0)) # warm up
    rows = {k: [] for k in arms}
    for r in range(rounds):
        a = seconds(learn, sync=sync)
        for k,cb in arms.items():
            if r>=2 and k not in main: continue
            b,c = seconds(learn, cb(), sync),seconds(learn, sync=sync)
            rows[k].append(2*b/(a+c)) # between two plain fits, so that a drift of the machine cancels
            a = c
    with timed(PolicyTransform, '__call__', sync) as tr,timed(HBACallback, 'hyper_step', sync) as hy,timed(Learner, '_do_one_batch', sync) as st:
        total = seconds(learn, HBACallback(seed=0, warmup=0.), sync)
    transform,hyper,steps = map(sum, (tr, hy, st))
    return dict(ratios={k: dict(ratio=float(np.median(v)), low=min(v), high=max(v), rounds=len(v)) for k,v in rows.items()},
                share_of_search=dict(transform=transform/total, forward_backward_step=steps/total, hyper_step=hyper/total), steps=batches, hyper_steps=batches//2,
                hyper_step_in_training_steps=(hyper/(batches//2))/(steps/batches))

@contextmanager
def profiled(cls, name, at, device):
    "The `torch.profiler.profile` of call number `at` of a method, in a list"
    P,out,n = torch.profiler,[],itertools.count(1)
    def call(f, *a, **k):
        if next(n)!=at: return f(*a, **k)
        with P.profile(activities=[P.ProfilerActivity.CPU, *([P.ProfilerActivity.CUDA] if device=='cuda' else [])]) as p: r = f(*a, **k)
        out.append(p); return r
    with around(cls, name, call): yield out

def longest(prof, device, n=9):
    "The calls with the most time of their own, in parts of all"
    own = (lambda e: e.self_device_time_total) if device=='cuda' else (lambda e: e.self_cpu_time_total)
    es = sorted(prof.key_averages(), key=own, reverse=True)
    total = sum(map(own, es))
    return dict(total_ms=total/1000, top=[[e.key, own(e)/total, e.count] for e in es[:n]])

def profile(model, device):
    "Where the time of one training step, of the transform of its batch and of one hyper-step goes"
    learn = learner(model, 8, device)
    with profiled(Learner, '_do_one_batch', 6, device) as a,profiled(PolicyTransform, '__call__', 6, device) as b,profiled(HBACallback, 'hyper_step', 3, device) as c: seconds(learn, HBACallback(seed=0, warmup=0.))
    return {k: longest(p[0], device) for k,p in (('training step (forward, backward, optimizer)',a), ('policy transform',b), ('hyper-step',c))}

def peak(model, strategy, batches, device):
    "MiB of one fit at its peak: allocated on the GPU; on a CPU, where the memory of a process is mostly noise of the allocator, the tensors kept for one backward pass (weights among them), gradients and momentum"
    learn,cbs = learner(model, batches, device),[NoValid(), *([HBACallback(strategy, seed=0, warmup=0.)] if strategy!='plain' else [])]
    if device=='cuda':
        torch.cuda.reset_peak_memory_stats()
        learn.fit(1, 1e-3, cbs=cbs)
        return torch.cuda.max_memory_allocated()/2**20
    held,most = {},[]
    def keep(t): held[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(); return t
    def fresh(f, *a, **k): held.clear(); f(*a, **k); most.append(sum(held.values()))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t),around(Learner, '_do_one_batch', fresh),around(HBACallback, 'hyper_step', fresh): learn.fit(1, 1e-3, cbs=cbs)
    return (max(most) + 2*sum(p.numel()*p.element_size() for p in learn.model.parameters()))/2**20

def table(d):
    rows = []
    for m,r in d['models'].items():
        rows += [f'**{m}**, images of {MODELS[m][1]} pixels, batch {MODELS[m][2]}','','| fit | time ÷ plain (lowest, highest; rounds) | memory ÷ plain |','| --- | --- | --- |']
        for k,v in r['ratios'].items():
            mem = r.get('memory', {}).get(k)
            rows.append('| {} | {:.2f} ({:.2f}, {:.2f}; {}) | {} |'.format(k, v['ratio'], v['low'], v['high'], v['rounds'], '{:.2f}'.format(mem/r['memory']['plain']) if mem else ''))
        s = r['share_of_search']
        rows += ['', f"Of a search with first_bn the policy transform takes {s['transform']:.1%}, forward, backward and optimizer {s['forward_backward_step']:.1%}, the hyper-steps {s['hyper_step']:.1%}; "
                     f"a hyper-step takes {r['hyper_step_in_training_steps']:.2f} of a training step.", *(['', '| profile of one | ms | of which |', '| --- | --- | --- |'] if 'profile' in r else []),
                 *[f"| {k} | {v['total_ms']:.1f} | {', '.join(f'{n} {t:.0%} ({c})' for n,t,c in v['top'])} |" for k,v in r.get('profile', {}).items()], '']
    return '\n'.join([*rows, footer(d['environment']), ''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--models', nargs='+', default=list(MODELS))
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--batches', type=int, default=12)
    ap.add_argument('--whole', action='store_true', help='only the default, with so many batches that the rest of λ at the start counts as in a whole fit; to results/surcharge_whole_DEVICE')
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
