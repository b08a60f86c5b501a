"""All that needs a GPU, in one run and one table. Use `benchmarks/gpu.sh`.

    python benchmarks/gpu.py [--epochs 200] [--device cuda]

The policy by the kernels and without them; synchronisations; a whole search against the plain training: WRN-40-2 on
4,000 images of CIFAR-10's shape (the JPEG archive if it is there, else noise: the seconds are the same), batch 128,
200 epochs, AMP. Writes results/gpu.json and .md after each part; a part that fails is named there, the others go on,
and the exit status is 1.
"""
import argparse,time,traceback
import torch
from unittest import mock
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.optimizer import SGD
from functools import partial
from common import *
from hba_fastai import ops
from hba_fastai.search import HBACallback
from hba_fastai.pba import PBAPolicy

def milliseconds(f, device, n=30):
    "Median milliseconds of `f` by device events"
    for _ in range(5): f()
    if device!='cuda':
        t = time.perf_counter(); f(); return 1000*(time.perf_counter()-t)
    out = []
    for _ in range(n):
        a,b = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        a.record(); f(); b.record(); b.synchronize()
        out.append(a.elapsed_time(b))
    return float(np.median(out))

# --- the policy

def transform(device, cases=((32,128),(32,512),(64,128),(224,64),(224,256))):
    "The policy, eager and fused, per batch: milliseconds, and GB/s of images read and written once, against a copy"
    return [one_size(device, *case) for case in cases]

def one_size(device, size, b):
    image = lambda *shape: torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    u,big,policy = image(b,3,size,size),image(2**28 if device=='cuda' else 2**20),PBAPolicy().to(device)
    lam = policy.space.start().to(device).expand(b,-1)
    drawn = policy.draw_under(lam, None)
    r = dict(size=size, batch=b, draw=milliseconds(lambda: policy.draw_under(lam, None), device),
             fused=milliseconds(lambda: policy.apply(u, drawn), device))
    with mock.patch.object(ops, 'fused', lambda *a: False): # by mock: no user has a reason to do without the kernels
        r['eager'] = milliseconds(lambda: policy.apply(u, drawn, dense=True), device)
    r['copy_gb_s'] = 2e-6*big.numel()/milliseconds(big.clone, device)
    kernel = one_kernel(u, drawn)
    if kernel: r['kernel_gb_s'] = 2e-6*u.numel()/milliseconds(kernel, device)
    return r

def one_kernel(u, drawn):
    "The launch that carries out the first slot of a draw, alone; None without the kernels"
    todo = ops.plan(drawn.op, drawn.m, drawn.centre, *u.shape[2:])
    if not ops.fused(u, todo.row): return None
    op,m,*lines = (o[:,0].contiguous() for o in todo)
    table = torch.arange(256, device=u.device).to(torch.uint8).repeat(*u.shape[:2],1)
    fill = torch.zeros(u.shape[1], dtype=torch.uint8, device=u.device)
    return lambda: ops.operate(u, op, m, table, *lines, fill)

# --- synchronisations

class Strict:
    """A probe, within which every synchronisation of the host is an error
    (fastai's own Recorder waits for the loss after each batch, outside of it)"""
    def __init__(self): self.n = 0
    def begin(self): torch.cuda.set_sync_debug_mode('error')
    def end(self):
        torch.cuda.set_sync_debug_mode('default')
        self.n += 1
    def around(self, f):
        self.begin()
        try: f()
        finally: self.end()

class StrictSearch(Watched):
    "A search whose own part of each training step and hyper-step is within `Strict`"
    def __init__(self):
        super().__init__(Strict())
        self.own = Strict()
    def before_batch(self): self.own.around(super().before_batch)
    def before_backward(self): self.own.around(super().before_backward)
    def after_backward(self): self.own.around(super().after_backward)
    def after_step(self): self.own.around(super().after_step)
    def hyper_step(self):
        self.stream.peek() # the loader is the user's
        super().hyper_step()

def synchronisations(device, data):
    "The parts of a training step and of a hyper-step that are ours, where a synchronisation is an error"
    learner(device, data).fit(1, 0.01, cbs=[NoValid(), HBACallback(seed=0, warmup=0.)]) # warm up and compile
    transform = Strict()
    learn,hba = learner(device, data, tfms=around_policy(transform)),StrictSearch()
    try: learn.fit(1, 0.01, cbs=[NoValid(), hba])
    finally: torch.cuda.set_sync_debug_mode('default')
    return dict(transforms=transform.n, hyper_steps=hba.probe.n)

# --- a whole search

def learner(device, data, tfms=()):
    learn = Learner(cifar_dls(data, bs=128, extra=tfms, device=device), wrn(40,2).to(memory_format=torch.channels_last),
                    opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=0.005)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    if device=='cuda': learn.add_cb(MixedPrecision(amp_mode='bf16'))
    return learn

def end_to_end(device, data, epochs):
    "Seconds of a whole search, of the plain training, and the parts"
    sync,few = torch.cuda.synchronize if device=='cuda' else (lambda: None),max(epochs//10, 1)
    search = lambda: HBACallback(seed=0, warmup=0.)
    def fit(n, *cbs, tfms=()):
        learn = learner(device, data, tfms)
        sync(); t = time.perf_counter()
        learn.fit(n, 0.05, cbs=[NoValid(), *cbs])
        sync(); return time.perf_counter()-t
    fit(2, search()) # warm up and compile
    plain = fit(few)*epochs/few
    transform,hyper = Seconds(sync),Seconds(sync)
    t = fit(few, Watched(hyper), tfms=around_policy(transform))
    timers = {'search, with timers': t*epochs/few, 'share of the transform': sum(transform.took)/t,
              'share of the hyper-steps': sum(hyper.took)/t}
    return {'plain': plain, **timers, 'search': fit(epochs, search()), 'epochs': epochs}

# --- the table

def transform_lines(rows):
    names = 'images','batch','draw ms','fused ms','eager ms','eager ÷ fused','images/s','one kernel GB/s','copy GB/s'
    out = [f"| {' | '.join(names)} |", f"|{' --- |'*len(names)}"]
    for r in rows:
        times = [f'{r[k]:.3f}' for k in ('draw','fused','eager')]
        speed = f"{r['eager']/r['fused']:.1f}",f"{1000*r['batch']/(r['draw']+r['fused']):,.0f}"
        rates = [f"{r.get(k, float('nan')):.0f}" for k in ('kernel_gb_s','copy_gb_s')]
        out.append(f"| {' | '.join([str(r['size']), str(r['batch']), *times, *speed, *rates])} |")
    return out

def synchronisation_lines(s):
    if not s: return ['Synchronisations: not looked for without a GPU.']
    return [f"No synchronisation in {s['transforms']} policy transforms and {s['hyper_steps']} hyper-steps."]

def end_to_end_lines(e):
    whole = f"search {e['search']:.1f} s, plain {e['plain']:.1f} s (a tenth of the epochs, times ten)"
    tr,hy = (f"{e[f'share of the {o}']:.1%}" for o in ('transform','hyper-steps'))
    return [f"End to end, WRN-40-2, {e['epochs']} epochs of 31 steps: {whole}, ratio {e['search']/e['plain']:.2f}.",
            f"Of a search with timers (which synchronise) the transform takes {tr}, the hyper-steps {hy}."]

LINES = dict(transform=transform_lines, synchronisations=synchronisation_lines, end_to_end=end_to_end_lines)

def table(d):
    out = []
    for part,lines in LINES.items():
        if part in d: out += [*lines(d[part]), '']
        if part in d['failed']: out += [f"**{part} failed**: {d['failed'][part]}", '']
    return '\n'.join([*out, footer(d['environment']), ''])

def write(parts):
    "The results of each part `{name: function}`, written after each; True if none failed"
    d = dict(failed={})
    for name,f in parts.items():
        try: d[name] = f()
        except Exception as e:
            traceback.print_exc()
            d['failed'][name] = f'{type(e).__name__}: {e}'.splitlines()[0]
        d['environment'] = environment()
        save_json(RESULTS/'gpu.json', d)
        (RESULTS/'gpu.md').write_text(table(d))
    print(table(d))
    return not d['failed']

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--epochs', type=int, default=200)
    ap.add_argument('--device', default='cuda')
    a = ap.parse_args()
    try: sets = reduced_cifar(0)
    except SystemExit:
        noise,g = lambda high,*shape: torch.randint(0, high, shape, generator=g),torch.Generator().manual_seed(0)
        sets = [(noise(256,n,3,32,32).to(torch.uint8),noise(10,n)) for n in (4000,10_000,1000)]
    data = [(x.to(a.device),y.to(a.device)) for x,y in sets]
    sys.exit(not write(dict(transform=lambda: transform(a.device),
                            synchronisations=lambda: synchronisations(a.device, data) if a.device=='cuda' else None,
                            end_to_end=lambda: end_to_end(a.device, data, a.epochs))))
