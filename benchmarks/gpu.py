"""All that needs a GPU, in one run and one table: kernels against the eager operations, synchronisations, throughput, the end-to-end search. Use `benchmarks/gpu.sh`.

    python benchmarks/gpu.py [--epochs 200] [--device cuda]

End to end: WRN-40-2 on 4,000 images of CIFAR-10's shape (the JPEG archive if it is there, else noise: the seconds are the same), batch 128, 200 epochs, AMP.
Writes results/gpu.json and .md.
"""
import argparse,time
import torch
from unittest import mock
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.core import Callback
from fastai.callback.progress import ProgressCallback
from fastai.learner import Learner
from fastai.optimizer import SGD
from functools import partial
from common import *
import hba_fastai.ops as ops
from hba_fastai.callback import HBACallback,PolicyTransform
from hba_fastai.policy import PBAPolicy
from hba_fastai.space import Space
from surcharge import timed

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

def transform(device):
    "The policy, eager and fused, per batch: milliseconds, images/s, bytes/s of the images read and written once, against a copy"
    rows = []
    for size,b in ((32,128),(32,512),(64,128),(224,64),(224,256)):
        u,policy = torch.randint(0, 256, (b,3,size,size), dtype=torch.uint8, device=device),PBAPolicy().to(device)
        lam = policy.space.start().expand(b,-1).to(device)
        draw,big = policy.draw(lam),torch.randint(0, 256, (2**28 if device=='cuda' else 2**20,), dtype=torch.uint8, device=device)
        r = dict(size=size, batch=b, draw=milliseconds(lambda: policy.draw(lam), device), fused=milliseconds(lambda: policy.apply(u, draw), device), copy_gb_s=2e-6*big.numel()/milliseconds(big.clone, device))
        with mock.patch.object(ops, 'fused', lambda *a: False): r['eager'] = milliseconds(lambda: policy.apply(u, draw, dense=True), device)
        todo,fill = ops.plan(draw.op, draw.m, draw.centre, size, size),torch.zeros(3, dtype=torch.uint8, device=device)
        if ops.fused(u, todo.row):
            t = torch.arange(256, device=device).to(torch.uint8).repeat(b,3,1)
            r['kernel'] = milliseconds(lambda: ops.operate(u, draw.op[:,0], draw.m[:,0], t, todo.row[:,0], todo.col[:,0], todo.hole_row[:,0], todo.hole_col[:,0], fill), device)
            r['kernel_gb_s'] = 2e-6*u.numel()/r['kernel']
        rows.append(r)
    return rows

def strict(f):
    "`f`, in which every synchronisation of the host is an error (fastai's own Recorder waits for the loss after each batch, outside of it)"
    def g(*a, **k):
        torch.cuda.set_sync_debug_mode('error')
        try: return f(*a, **k)
        finally: torch.cuda.set_sync_debug_mode('default')
    return g

def learner(device, data, amp=True):
    learn = Learner(cifar_dls(data, bs=128, device=device), wrn(40,2).to(memory_format=torch.channels_last), opt_func=partial(SGD, mom=0.9, decouple_wd=False), wd=0.005)
    learn.remove_cb(ProgressCallback); learn.logger = quiet
    if amp: learn.add_cb(MixedPrecision(amp_mode='bf16') if device=='cuda' else Callback())
    return learn

def synchronisations(device, data):
    "The parts of a training step and of a hyper-step that are ours, under the debug mode that makes a synchronisation an error"
    learn,hba = learner(device, data),HBACallback(seed=0, warmup=0.)
    learn.fit(1, 0.01, cbs=[NoValid(), hba]) # the first batch of a search looks at the images once
    names,done = ['before_batch','before_backward','after_backward','after_step'],[]
    def apply(*a, inner=PBAPolicy.apply, **k): done.append('transform'); return strict(inner)(*a, **k)
    with mock.patch.object(PBAPolicy, 'apply', apply),mock.patch.object(PBAPolicy, 'draw', strict(PBAPolicy.draw)):
        for n in names: setattr(hba, n, strict(getattr(hba, n)))
        step = hba.hyper_step
        def hyper_step():
            b = next(hba.stream) # the loader is the user's
            with mock.patch.object(type(hba.stream), '__next__', lambda self: b): done.append('hyper'); strict(step)()
        hba.hyper_step = hyper_step
        learn.fit(1, 0.01, cbs=[NoValid(), hba])
    return dict(transforms=done.count('transform'), hyper_steps=done.count('hyper'))

def end_to_end(device, data, epochs):
    "Seconds of a whole search, of the plain training, and the parts"
    sync,out = torch.cuda.synchronize if device=='cuda' else (lambda: None),{}
    def fit(cb, n):
        learn = learner(device, data)
        sync(); t = time.perf_counter()
        learn.fit(n, 0.05, cbs=[NoValid(), *cb])
        sync(); return time.perf_counter()-t
    fit([HBACallback(seed=0, warmup=0.)], 2) # warm up and compile
    out['plain'],out['search, with timers'] = fit([], max(epochs//10, 1))*epochs/max(epochs//10, 1),0.
    with timed(PolicyTransform, '__call__', sync) as tr,timed(HBACallback, 'hyper_step', sync) as hy: t = fit([HBACallback(seed=0, warmup=0.)], max(epochs//10, 1))
    out.update({'search, with timers': t*epochs/max(epochs//10, 1), 'share of the transform': sum(tr)/t, 'share of the hyper-steps': sum(hy)/t})
    out['search'] = fit([HBACallback(seed=0, warmup=0.)], epochs)
    return {**out, 'epochs': epochs}

def table(d):
    rows = ['| images | batch | draw ms | fused ms | eager ms | eager ÷ fused | images/s | one kernel GB/s | copy GB/s |','| --- | --- | --- | --- | --- | --- | --- | --- | --- |']
    for r in d['transform']:
        rows.append(f"| {r['size']} | {r['batch']} | {r['draw']:.3f} | {r['fused']:.3f} | {r['eager']:.3f} | {r['eager']/r['fused']:.1f} | {1000*r['batch']/(r['draw']+r['fused']):,.0f} | {r.get('kernel_gb_s', float('nan')):.0f} | {r['copy_gb_s']:.0f} |")
    e,s = d['end_to_end'],d['synchronisations']
    rows += ['', f"End to end, WRN-40-2, {e['epochs']} epochs of 31 steps: search {e['search']:.1f} s, plain {e['plain']:.1f} s (a tenth of the epochs, times ten), ratio {e['search']/e['plain']:.2f}. "
             f"Of a search with timers (which synchronise) the transform takes {e['share of the transform']:.1%}, the hyper-steps {e['share of the hyper-steps']:.1%}.", '',
             f"No synchronisation in {s['transforms']} policy transforms and {s['hyper_steps']} hyper-steps." if s else 'Synchronisations: not looked for without a GPU.', '']
    return '\n'.join([*rows, footer(d['environment']), ''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--epochs', type=int, default=200)
    ap.add_argument('--device', default='cuda')
    a = ap.parse_args()
    try: sets = reduced_cifar(0)
    except SystemExit:
        g = torch.Generator().manual_seed(0)
        sets = [(torch.randint(0, 256, (n,3,32,32), dtype=torch.uint8, generator=g),torch.randint(0, 10, (n,), generator=g)) for n in (4000,10_000,1000)]
    data = [(x.to(a.device),y.to(a.device)) for x,y in sets]
    d = dict(transform=transform(a.device), synchronisations=synchronisations(a.device, data) if a.device=='cuda' else None, end_to_end=end_to_end(a.device, data, a.epochs), environment=environment())
    save_json(RESULTS/'gpu.json', d)
    (RESULTS/'gpu.md').write_text(table(d))
    print(table(d))
