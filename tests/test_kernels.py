"The Triton kernels against the eager operations (in the interpreter, on a GPU), and through the compiler without a GPU"
import os,subprocess,sys
import pytest,torch
from conftest import recorded
from hba_fastai import kernels
from hba_fastai.ops import apply_ops
from torch._subclasses.fake_tensor import FakeTensorMode

triton = pytest.importorskip('triton')
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

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
from hba_fastai.space import TABLE7
def check(c, h, w, n=90):
    torch.manual_seed(c*h)
    v = torch.randint(0, 256, (n,c,h,w), dtype=torch.uint8)
    v[:15] = v[:15]//2+40; v[15:18] = 77 # narrow ranges, one level
    op = torch.stack([torch.arange(n)%16-1, torch.randint(-1, 15, (n,))], 1) # every operation first, any second
    lo,hi = torch.tensor([TABLE7[ops.OP_NAMES[o]] or (0,1) for o in op.flatten().tolist()]).view(n,2,2).unbind(2)
    m = lo + (hi-lo)*torch.rand(n,2)
    m = torch.where((op<5) & (torch.rand(n,2)<0.5), -m, m)
    if c==1: op[op==ops.OP['Color']] = -1
    args,calls = (v, op, m, torch.rand(n,2,2), torch.tensor([9,99,199])[:c]/255),[]
    operate = lambda *a: calls.append(1) or kernels.operate(*a)
    with mock.patch.object(ops, 'fused', lambda *a: False): want = ops.apply_ops(*args, dense=True)
    with mock.patch.multiple(ops, fused=fused, operate=operate): got = ops.apply_ops(*args, dense=True)
    assert len(calls)==2
    d = (got.int()-want.int()).abs().amax((1,2,3))
    one = op[:,1]<0 # within one level; a second operation may magnify that (an inversion from a threshold on)
    names = [[(ops.OP_NAMES+['none'])[o] for o in r] for r in op.tolist()]
    assert d[one].max()<=1 and (d>1).float().mean()<=0.05, [(*o,x) for o,x in zip(names, d.tolist()) if x]
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

TYPES = {torch.uint8: 'u8', torch.int32: 'i32', torch.int64: 'i64', torch.float32: 'fp32'}

def compiled(kernel, args, cc):
    "`kernel` for compute capability `cc`, by what it is launched with: types, and which numbers are multiples of 16"
    constant = {p.name: a for p,a in zip(kernel.params, args) if p.is_constexpr}
    tensor = lambda a: isinstance(a, torch.Tensor)
    kind = lambda a: f'*{TYPES[a.dtype]}' if tensor(a) else 'i32'
    signature = {p.name: 'constexpr' if p.is_constexpr else kind(a) for p,a in zip(kernel.params, args)}
    even = [i for i,a in enumerate(args) if tensor(a) or a%16==0] # a tensor of its own begins at such an address
    attrs = {(i,): [['tt.divisibility',16]] for i in even if not kernel.params[i].is_constexpr}
    return triton.compile(ASTSource(kernel, signature, constant, attrs), target=GPUTarget('cuda', cc, 32)).asm

@pytest.mark.parametrize('cc', [75,80,90,100]) # Turing, Ampere, Hopper, Blackwell
@pytest.mark.parametrize('c,h,w', [(1,17,23),(3,32,32)])
def test_kernels_go_through_the_compiler(c, h, w, cc, tmp_path, monkeypatch):
    "To machine code, without a GPU: with just the arguments that a batch on one launches them with"
    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    with FakeTensorMode(),recorded() as launches:
        zeros = lambda *shape, dtype=torch.float32: torch.zeros(*shape, dtype=dtype, device='cuda')
        x,op = zeros(8, c, h, w, dtype=torch.uint8),zeros(8, 2, dtype=torch.int64)
        apply_ops(x, op, zeros(8, 2), zeros(8, 2, 2))
    assert [name for name,*_ in launches]==['_statistics','_operate']*2
    for name,_,args in launches[:2]:
        assert all(a.is_cuda and a.is_contiguous() for a in args if isinstance(a, torch.Tensor))
        asm = compiled(getattr(kernels, name), args, cc)
        assert f'.target sm_{cc}' in asm['ptx'] and asm['cubin'][:4]==b'\x7fELF'
