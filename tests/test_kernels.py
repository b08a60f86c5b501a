"The Triton kernels against the eager operations: in Triton's interpreter on a CPU, compiled where there is a GPU"
import os,subprocess,sys
import pytest,torch

pytest.importorskip('triton')
INTERPRETED = '''
import torch
from unittest import mock
from hba_fastai import kernels,ops
fused = lambda v,row: v.shape[1] in (1,3) and not row.is_floating_point()
'''
COMPILED = '''
import torch
from unittest import mock
from hba_fastai import kernels,ops
fused = kernels.fused
torch.set_default_device('cuda')
'''
CHECK = '''
def check(c, h, w, n=90):
    torch.manual_seed(c*h)
    v = torch.randint(0, 256, (n,c,h,w), dtype=torch.uint8)
    v[:15] = v[:15]//2+40; v[15:18] = 77 # narrow ranges, one level
    op = torch.stack([torch.arange(n)%16-1, torch.randint(-1, 15, (n,))], 1) # every operation first, any second
    m = torch.tensor([[(lo+(hi-lo)*u) for lo,hi in [ops.TABLE7[ops.OP_NAMES[o]] or (0,1)]][0] for row,r in zip(op.tolist(), torch.rand(n,2).tolist()) for o,u in zip(row, r)]).view(n,2)
    m = torch.where((op<5) & (torch.rand(n,2)<0.5), -m, m)
    if c==1: op[op==ops.OP['Color']] = -1
    centre,fill,calls = torch.rand(n,2,2),torch.tensor([9,99,199])[:c]/255,[]
    with mock.patch.object(ops, 'fused', lambda *a: False): want = ops.apply_ops(v, op, m, centre, fill, dense=True)
    with mock.patch.object(ops, 'fused', fused),mock.patch.object(ops, 'operate', lambda *a: calls.append(1) or kernels.operate(*a)): got = ops.apply_ops(v, op, m, centre, fill, dense=True)
    assert len(calls)==2
    d = (got.int()-want.int()).abs().amax((1,2,3))
    one = op[:,1]<0 # after one operation: within one level. A second may magnify that level (an inversion from a threshold on)
    assert d[one].max()<=1 and (d>1).float().mean()<=0.05, [(ops.OP_NAMES[o[0]],ops.OP_NAMES[o[1]],x) for o,x in zip(op.tolist(), d.tolist()) if x]
    return d.max().item()
print(check(3, 17, 23), check(1, 32, 32), check(3, 40, 40))
'''

def run(code, **env):
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env={**os.environ, **env})
    assert not r.returncode, r.stderr[-3000:]
    return r.stdout

def test_kernels_in_the_interpreter(): assert len(run(INTERPRETED+CHECK, TRITON_INTERPRET='1').split())==3

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_kernels_compiled(): run(COMPILED+CHECK)
