"""What a search costs: time and memory of a fit with HBACallback ÷ the same fit without it, in one run.

    python benchmarks/surcharge.py [--models wrn-16-2 resnet18] [--device cpu] [--threads 2]

Plain fits and searches of the same few batches alternate, and the ratio is the median over rounds, with its spread. Writes results/surcharge_DEVICE.json and .md.
"""
import argparse,resource,subprocess,time
import torch
from fastai.callback.core import Callback,CancelValidException
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.optimizer import SGD
from functools import partial
from common import *
from hba_fastai.callback import HBACallback,ScheduleCallback,PolicyTransform
from hba_fastai.schedule import Schedule
from hba_fastai.space import Space

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

class NoValid(Callback):
    def before_validate(self): raise CancelValidException

class Timed:
    "Adds up the seconds that a method takes"
    def __init__(self, cls, name, sync): self.cls,self.name,self.f,self.t,self.sync = cls,name,getattr(cls,name),0.,sync
    def __enter__(self):
        def timed(*a, **k):
            self.sync(); t = time.perf_counter()
            try: return self.f(*a, **k)
            finally: self.sync(); self.t += time.perf_counter()-t
        setattr(self.cls, self.name, timed); return self
    def __exit__(self, *a): setattr(self.cls, self.name, self.f)

def seconds(learn, cb=None, sync=lambda: None):
    sync(); t = time.perf_counter()
    learn.fit(1, 1e-3, cbs=[NoValid(), *([cb] if cb else [])])
    sync(); return time.perf_counter()-t

def ratios(model, rounds, batches, device):
    "Ratio of the times for each strategy and for the replay, and the shares of a search"
    sync = torch.cuda.synchronize if device=='cuda' else lambda: None
    learn,out = learner(model, batches, device),{}
    start = Schedule([0.], Space().values(Space().start())[None])
    arms = {'plain again': lambda: None, **{s: (lambda s=s: HBACallback(s, seed=0)) for s in STRATEGIES}, 'first_bn, dose': lambda: HBACallback(condition='dose', seed=0), 'replay': lambda: ScheduleCallback(start, seed=0)}
    seconds(learn); seconds(learn, HBACallback(seed=0)) # warm up
    rows = {k: [] for k in arms}
    for _ in range(rounds):
        a = seconds(learn, sync=sync)
        for k,cb in arms.items():
            b,c = seconds(learn, cb(), sync),seconds(learn, sync=sync)
            rows[k].append(2*b/(a+c)) # between two plain fits, so that a drift of the machine cancels
            a = c
    for k,v in rows.items(): out[k] = dict(ratio=float(np.median(v)), low=min(v), high=max(v))
    with Timed(PolicyTransform, '__call__', sync) as tr,Timed(HBACallback, 'hyper_step', sync) as hy:
        total = sum(seconds(learn, HBACallback(seed=0), sync) for _ in range(rounds))
    share = dict(transform=tr.t/total, hyper_step=hy.t/total)
    return dict(ratios=out, share_of_search=share)

def peak(model, strategy, batches, device):
    "Peak memory of one fit in a process of its own, in MiB, above what the process had before it"
    learn = learner(model, batches, device)
    if device=='cuda': torch.cuda.reset_peak_memory_stats()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024
    learn.fit(1, 1e-3, cbs=[NoValid(), *([HBACallback(strategy, seed=0)] if strategy!='plain' else [])])
    if device=='cuda': return torch.cuda.max_memory_allocated()/2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/1024 - before

def table(d):
    rows = []
    for m,r in d['models'].items():
        rows += [f'**{m}**, images of {MODELS[m][1]} pixels, batch {MODELS[m][2]}','','| fit | time ÷ plain (lowest, highest of {} rounds) | peak memory ÷ plain |'.format(d['rounds']),'| --- | --- | --- |']
        for k,v in r['ratios'].items():
            mem = r['memory'].get(k)
            rows.append('| {} | {:.2f} ({:.2f}, {:.2f}) | {} |'.format(k, v['ratio'], v['low'], v['high'], '{:.2f}'.format(mem/r['memory']['plain']) if mem else ''))
        s = r['share_of_search']
        rows += ['', f"Of the search with first_bn, the policy transform takes {s['transform']:.1%} and the hyper-steps {s['hyper_step']:.1%}.", '']
    e = d['environment']
    return '\n'.join([*rows, f"`{e['command']}`, {e['date']}, torch {e['torch']}, {e['gpu'] or e['machine']}, {e['threads']} threads.", ''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--models', nargs='+', default=list(MODELS))
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--threads', type=int, default=2)
    ap.add_argument('--rounds', type=int, default=5)
    ap.add_argument('--batches', type=int, default=8)
    ap.add_argument('--peak', help='print the peak memory of one strategy, or of `plain`, and stop')
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    if a.peak: print('PEAK', peak(a.models[0], a.peak, a.batches, a.device)); sys.exit()
    d = dict(models={}, rounds=a.rounds, batches=a.batches)
    for m in a.models:
        d['models'][m] = ratios(m, a.rounds, a.batches, a.device)
        mem = lambda s: float(subprocess.run([sys.executable, '-W', 'ignore', __file__, '--models', m, '--device', a.device, '--threads', str(a.threads), '--batches', '4', '--peak', s],
                                             capture_output=True, text=True, check=True).stdout.split('PEAK')[1])
        d['models'][m]['memory'] = {s: float(np.median([mem(s) for _ in range(3)])) for s in ['plain','first_bn','conv+bn']}
    d['environment'] = environment()
    out = RESULTS/f'surcharge_{a.device}.json'
    save_json(out, d)
    out.with_suffix('.md').write_text(table(d))
    print(table(d))
