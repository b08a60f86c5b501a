"""Bytes moved and launches of the policy on a batch on a GPU: a count, and no measurement. Needs no GPU.

    python benchmarks/traffic.py [--bandwidth 3.35]

The policy runs on fake tensors, which have a device and no data. Each operation of ATen that is no view counts as one
launch (a few are more) and moves its arguments and its results once, a broadcast one by what it holds. What the two
Triton kernels read depends on what the images drew: here by a real draw at λ = 0, on a CPU.
Writes results/traffic.json and .md.
"""
import argparse
import torch,triton
from contextlib import contextmanager
from unittest import mock
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from common import *
from hba_fastai import kernels,ops
from hba_fastai.pba import PBAPolicy

def held(t):
    "Bytes of the different numbers that a tensor shows"
    return t.element_size()*int(np.prod([n for n,stride in zip(t.shape, t.stride()) if stride]))

class Traffic(TorchDispatchMode):
    "Counts launches and bytes of the operations of ATen"
    launches,moved = 0,0
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f.namespace!='aten': return f(*args, **kwargs)
        with self: out = f.decompose(*args, **kwargs)
        if out is not NotImplemented: return out
        out = f(*args, **kwargs)
        if f.is_view or f._opname.startswith(('empty','new_empty')): return out
        self.launches += 1
        self.moved += sum(held(o) for o in tree_leaves((args,kwargs,out)) if isinstance(o, Tensor))
        return out

@contextmanager
def recorded():
    "Within, the kernels are not launched: gives a list of what they would be launched with, `(name, arguments)`"
    # by mock: fake tensors cannot be launched, and no user has to replace a kernel
    class Kernel:
        def __init__(self, name): self.name = name
        def __getitem__(self, grid): return lambda *args: launches.append((self.name,args))
    launches = []
    with mock.patch.multiple(kernels, _statistics=Kernel('_statistics'), _operate=Kernel('_operate')): yield launches

def share(codes, names): return sum(ops.OP_NAMES[c] in names for c in codes if c>=0)/len(codes)

def kernel_bytes(name, args, codes):
    "What a launch moves, when the images drew the operations `codes`"
    if name=='_statistics':
        v,op,hist,grey = (held(o) for o in args[:4])
        histogram,contrast = (share(codes, names) for names in (['AutoContrast','Equalize'],['Contrast']))
        return op + (histogram+contrast)*v + 2*histogram*hist + 2*contrast*grey # read and written
    v,out,op,m,table,*rest = (held(o) for o in args if isinstance(o, Tensor))
    return v + out + op + m + share(codes, ops.TABLE)*table + sum(rest)

def count(f, codes):
    "Launches, Triton kernels among them, and bytes of `f()`; `codes` are those of each slot that `f` works on"
    with recorded() as launches,Traffic() as traffic: f()
    own = sum(kernel_bytes(*launch, codes[i//2]) for i,launch in enumerate(launches)) # two for each slot
    return dict(launches=traffic.launches+len(launches), kernels=len(launches), bytes=round(traffic.moved+own))

def parts(b, size):
    "Counts of the parts of a batch"
    real = PBAPolicy().draw_under(torch.zeros(b, 54), torch.Generator().manual_seed(0)).op.T.tolist()
    policy = PBAPolicy(fill=0.5) # real: fake tensors cannot be copied from its class
    with FakeTensorMode(allow_non_fake_inputs=True):
        policy,lam = policy.to('cuda'),torch.zeros(b, 54, device='cuda')
        u,fill = (torch.zeros(*shape, dtype=torch.uint8, device='cuda') for shape in ((b,3,size,size),(3,)))
        drawn = policy.draw_under(lam, None)
        plan = lambda: ops.plan(drawn.op, drawn.m, drawn.centre, size, size)
        slots = [[o[:,k] for o in plan()] for k in (0,1)]
        out = {'draw': count(lambda: policy.draw_under(lam, None), real), 'plan': count(plan, real)}
        for k,slot in enumerate(slots): out[f'slot {k+1}, fused'] = count(lambda: ops.fused_slot(u, *slot, fill), real[k:])
        out['draw and apply, fused'] = count(lambda: policy.apply(u, policy.draw_under(lam, None)), real)
        with mock.patch.object(ops, 'fused', lambda *a: False):
            out['draw and apply, eager'] = count(lambda: policy.apply(u, policy.draw_under(lam, None)), real)
    return {**out, 'images read and written once': dict(launches=1, kernels=0, bytes=2*b*3*size*size)}

def table(d):
    rows = ['| images | batch | part | launches | of them Triton | MB moved | at least, µs | µs per launch |',
            '| --- | --- | --- | --- | --- | --- | --- | --- |']
    for r in d['rows']:
        for part,c in r['parts'].items():
            us = c['bytes']/d['bandwidth']/1e6
            cells = part,c['launches'],c['kernels'],f"{c['bytes']/1e6:.2f}",f"{us:.2f}",f"{us/c['launches']:.3f}"
            rows.append(f"| {r['size']}x{r['size']} | {r['batch']} | {' | '.join(map(str, cells))} |")
    note = f"""A count and not a measurement: launches are the operations of ATen that are no views (a few are more than
one), and the Triton kernels; bytes are what they read and write, each number once, at λ = 0. "At least" is their time
at {d['bandwidth']} TB/s, the memory bandwidth of an H100 (SXM). Where that is far below the few µs that a launch takes,
launches decide."""
    e = d['environment']
    return '\n'.join([*rows,'',note,'',footer(e, f"triton {triton.__version__}"),''])

if __name__=='__main__':
    ap = argparse.ArgumentParser()
    ap.add_argument('--bandwidth', type=float, default=3.35, help='TB/s')
    a = ap.parse_args()
    rows = [dict(size=s, batch=128, parts=parts(128, s)) for s in (32,224)]
    d = dict(rows=rows, bandwidth=a.bandwidth, environment=environment())
    save_json(RESULTS/'traffic.json', d)
    (RESULTS/'traffic.md').write_text(table(d))
    print(table(d))
