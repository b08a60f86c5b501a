"""A search on a GPU without one: fake tensors have a device and no data, so that whatever asks for a number raises

On `cuda` where there is no backward pass, which wants a driver; with one on `lazy`, another device that is not the
host, whose backward pass torch runs in the host's own thread."""
import pytest, torch
import torch.nn.functional as F
from conftest import recorded, small_net
from fastai.optimizer import SGD
from hba_fastai.exploit import descend,take_best
from hba_fastai.hypernet import HyperNet
from hba_fastai.kernels import triton
from hba_fastai.ops import apply_ops
from hba_fastai.optimizer import trained_with
from hba_fastai.pba import PBAPolicy
from hba_fastai.policy import Data
from hba_fastai.search import HBACallback
from hba_fastai.transform import population
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException,DynamicOutputShapeException,FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from types import SimpleNamespace

class no_waiting(TorchDispatchMode):
    "Raise where tensors of two devices meet, as in a copy for which the host waits; numbers of the host may go along"
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if f.namespace=='aten': # look into what consists of other operations
            with self: out = f.decompose(*args, **kwargs)
            if out is not NotImplemented: return out
        out = f(*args, **kwargs)
        copies = f._opname in ('_to_copy','copy_')
        if copies and (kwargs.get('non_blocking') or args[2:]==(True,)): return out
        tensors = [o for o in tree_leaves((args,kwargs,out)) if isinstance(o, Tensor) and (copies or o.dim())]
        devices = {o.device.type for o in tensors}
        if len(devices)>1: raise RuntimeError(f"{f} waits: it meets tensors on {sorted(devices)}")
        return out

@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=True): yield

# --- the guard

WAITS = dict(
    item=lambda x: x[0].item(), list=lambda x: x.tolist(), truth=lambda x: bool(x[0]>0), int=lambda x: int(x.sum()),
    nonzero=lambda x: x.nonzero(), mask=lambda x: x[x>0], cpu=lambda x: x.cpu(), number=lambda x: x[0].to('cpu'),
    scalar=lambda x: torch.tensor(1., device=x.device), tensor=lambda x: torch.tensor([1.], device=x.device),
    copied=lambda x: x.copy_(torch.zeros(4)), index=lambda x: x[torch.tensor([0,1])], mixed=lambda x: x+torch.zeros(4))
RAISED = DataDependentOutputException,DynamicOutputShapeException,RuntimeError

@pytest.mark.parametrize('device', ['cuda','lazy'])
@pytest.mark.parametrize('name', WAITS)
def test_the_guard_sees_what_waits(name, device, fake):
    x = torch.zeros(4, device=device)
    with no_waiting(),pytest.raises(RAISED): WAITS[name](x)

@pytest.mark.parametrize('device', ['cuda','lazy'])
def test_the_guard_lets_pass_what_does_not_wait(device, fake):
    x = torch.zeros(4, device=device)
    with no_waiting():
        y = torch.ones(4).to(device, non_blocking=True) + torch.full((), 2., device=device)*x + torch.tensor(3.)
        assert torch.where(x>0, y, 0.)[:2].amax(0, keepdim=True).device.type==device

# --- the operations, in the ways that they have on a GPU

@pytest.mark.parametrize('dtype', [torch.uint8,torch.float32,torch.float16])
@pytest.mark.parametrize('c,bilinear', [(1,False),(3,False),(4,False),(3,True)])
def test_the_operations_do_not_wait(c, bilinear, dtype, fake):
    "By the kernels for 1 and 3 channels and the nearest pixel, one after the other elsewhere"
    zeros = lambda *shape, dtype=torch.float32: torch.zeros(*shape, dtype=dtype, device='cuda')
    x,op = zeros(8, c, 17, 23, dtype=dtype),zeros(8, 2, dtype=torch.long)
    m,centre,fill = zeros(8, 2),zeros(8, 2, 2),zeros(c)
    with no_waiting(),recorded() as launches: y = apply_ops(x, op, m, centre, fill, bilinear)
    assert (y.device,y.dtype,y.shape)==(x.device,dtype,x.shape)
    assert [name for name,*_ in launches]==(['_statistics','_operate']*2 if triton and c<4 and not bilinear else [])

# --- the policy

@pytest.mark.parametrize('skip', [(),('Cutout','Invert')])
@pytest.mark.parametrize('fill', [0.5,(0.1,0.2,0.3)])
def test_a_policy_does_not_wait(fill, skip, fake):
    policy,lam = PBAPolicy(fill, skip=skip).to('cuda'),torch.zeros(54, device='cuda')
    x = torch.zeros(8, 3, 16, 16, device='cuda')
    with no_waiting(),recorded():
        y,lam_i,drawn = augmented(policy, lam, x)
        out = [y, lam_i, *drawn, policy.dose(drawn)]
        out += [policy.expected(lam), policy.expected(lam, 1.), policy.p_applied(lam)]
        assert {o.device.type for o in out}=={'cuda'}

# --- a step of a search, by its parts, and of a replay

def augmented(policy, lam, x, sigma=1.):
    "What `PolicyTransform` does to a batch: the images, λ of each, and what was drawn"
    lam_i = population(lam, sigma, len(x), None, policy.active)
    drawn = policy.draw_under(lam_i)
    return policy.apply(x, drawn),lam_i,drawn

def trained(net, model, opt, z, x, y):
    "A training step: each image meets its own network"
    net.respond(z)
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    opt.step(); opt.zero_grad()
    net.respond(None)
    return loss.detach()

PAPER = dict(condition='lambda', centred=False, joint=False)

@pytest.mark.parametrize('kw', [dict(condition='dose'),dict(condition='lambda'),PAPER,dict(exploit='best')])
def test_a_step_of_a_search_does_not_wait(kw, device='lazy'):
    hba = HBACallback(**kw)
    hba.bound = hba.policies.bound(Data(), 1.) # copies, which fake tensors must not be asked for
    with FakeTensorMode(allow_non_fake_inputs=True): steps_of(hba, device)

def steps_of(hba, device):
    with torch.device(device): model = small_net()
    hba.bound,lam = hba.bound.to(device),hba.lam.to(device)
    policy,z = hba.bound.parts[0],hba.z(lam.value)
    x,y = torch.zeros(8, 3, 16, 16, device=device),torch.zeros(8, dtype=torch.long, device=device)
    opt,net = SGD(list(model.parameters()), 0.1, mom=0.9),HyperNet([('1',model[1])], len(z), centred=hba.centred)
    with net.attached(z),trained_with(opt, net.params):
        net.hold_phi0(True)
        with no_waiting():
            for _ in range(2): # the first creates the optimizer's state
                xb,lam_i,drawn = augmented(policy, lam.value, x)
                hba.tfms = [SimpleNamespace(lam_i=lam_i, drawn=drawn)]
                loss = trained(net, model, opt, hba.z_batch(), xb, y)
                what = net,model,lambda: F.cross_entropy(model(x), y),lam,hba.z
                hyper_loss,ok = take_best(*what, lam_i[:3]) if hba.exploit=='best' else descend(*what, 0.1)
                net.move_to(hba.z(lam.value))
                assert {o.device.type for o in (loss,hyper_loss,lam.value,*lam.adam,ok)}=={device}
        assert all(p.device.type==device for p,_ in net.params)

def test_a_step_of_a_replay_does_not_wait(fake, device='cuda'):
    policy,x = PBAPolicy().to(device),torch.zeros(8, 3, 16, 16, device=device)
    on_host = torch.zeros(54) # of the schedule, whose numbers are the host's
    with no_waiting(),recorded():
        lam = on_host.to(device, non_blocking=True)
        assert augmented(policy, lam, x)[0].device.type==device
