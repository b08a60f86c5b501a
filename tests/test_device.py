"""What a search needs of a device: no float64 off the CPU, since Apple's GPUs have none

Seen without such a GPU: tensors on the meta device, and fake tensors, have a device and a dtype and no data."""
import pytest, torch
import torch.nn.functional as F
from conftest import small_net
from hba_fastai.search import HBACallback,LAM_MAX
from hba_fastai.evidence import signal
from hba_fastai.hyper import HyperNet,adam,adam_start,hypergradient
from hba_fastai.pba import PBAPolicy
from hba_fastai.space import PBASpace
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

class no_float64(TorchDispatchMode):
    "Raise where an operation makes or takes a float64 tensor off the CPU"
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [o for o in tree_leaves((args,kwargs,out)) if isinstance(o, torch.Tensor)]
        odd = [o for o in tensors if o.dtype==torch.float64 and o.device.type!='cpu']
        if odd: raise TypeError(f"{func} makes or takes float64 on {odd[0].device}")
        return out

def test_the_guard_sees_float64():
    with no_float64():
        torch.zeros(3, dtype=torch.float64)
        for f in (lambda: torch.zeros(3, dtype=torch.float64, device='meta'),
                  lambda: torch.zeros(3, device='meta').double(), lambda: PBASpace().lo.to('meta')):
            with pytest.raises(TypeError, match='float64 on meta'): f()

@pytest.mark.parametrize('sigma', [0.,1.])
@pytest.mark.parametrize('fill', [0.5,torch.rand(3)])
def test_a_policy_needs_no_float64(fill, sigma):
    with no_float64():
        policy = PBAPolicy(fill, limits={'Rotate': (0,10)}).to('meta')
        lam = torch.zeros(54, device='meta', requires_grad=True)
        d = policy.draw_under(lam.detach().repeat(8,1), None)
        f,z = policy.features(d),policy.expected(lam, sigma)
        z.sum().backward()
        assert {o.device.type for o in (*d,f,z,lam.grad)}=={'meta'} and f.dtype==z.dtype==torch.float32
        for x in (torch.rand(8,3,16,16, device='meta'),torch.zeros(8,3,16,16, dtype=torch.uint8, device='meta')):
            for policy.bilinear in (False,True): assert policy.apply(x, d).dtype==x.dtype

def test_a_policy_needs_no_float64_on_a_gpu():
    """All but the operations, whose coordinates are float64 there as Pillow's are,
    and the backward pass, which wants a driver"""
    with FakeTensorMode(allow_non_fake_inputs=True),no_float64():
        policy,lam = PBAPolicy().to('cuda'),torch.zeros(54, device='cuda')
        d = policy.draw_under(lam.repeat(8,1), None)
        assert {o.device.type for o in (*d,policy.features(d),policy.expected(lam),policy.expected(lam, 1.))}=={'cuda'}

@pytest.mark.parametrize('space', [PBASpace(),PBASpace().to('meta')])
def test_a_space_needs_no_float64(space):
    lam = torch.zeros(54, device='meta')
    with no_float64():
        assert space.values(lam).dtype==space.expected(lam, 1.).dtype==torch.float32
        for f in (space.lam,space.named): # as far as they go without data
            with pytest.raises((NotImplementedError,RuntimeError), match='meta'): f(lam)

def test_float64_stays_on_the_cpu():
    policy = PBAPolicy().to('cpu')
    assert policy.expected(torch.zeros(54, dtype=torch.float64), 1.).dtype==torch.float64
    assert policy.gauss.dtype==policy.space.lo.dtype==torch.float64

@pytest.mark.parametrize('kw', [{}, dict(condition='lambda', centred=False)])
def test_a_hyper_step_needs_no_float64(kw):
    hba,model = HBACallback(**kw),small_net().to('meta')
    x,y = torch.rand(4,3,12,12, device='meta'),torch.zeros(4, dtype=torch.long, device='meta')
    with no_float64():
        hba.policy = PBAPolicy().to('meta')
        lam,lowest = hba.lam.to('meta'),hba.lowest.to('meta')
        z = hba.z(lam).detach()
        with HyperNet([('1',model[1])], len(z)) as net:
            net.set(torch.zeros(4, len(z), device='meta'))
            F.cross_entropy(model(x), y).backward()
            own = None if hba.centred else torch.zeros_like(z)
            l,g = hypergradient(net, model, lambda: F.cross_entropy(model(x), y), lam, hba.z, ref=own)
            new,_,ok = adam(lam, g, adam_start(lam), 0.1, hba.joint)
            net.fold(hba.z(new.clamp(max=LAM_MAX).max(lowest)).detach()-z)
        assert new.dtype==torch.float32 and {o.device.type for o in (l,g,new,ok)}=={'meta'}
        with pytest.raises(NotImplementedError, match='meta'): signal(torch.zeros(3,54, device='meta')) # to the CPU first
        hba.lam,hba.done = lam,0
        with pytest.raises(NotImplementedError, match='meta'): hba._note(0)
