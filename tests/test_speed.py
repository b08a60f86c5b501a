"Guards of the cost, as ratios of counts (floating point operations, calls), so that no clock is needed"
import torch
from fastai.callback.core import Callback,CancelValidException
from fastai.learner import Learner
from hba_fastai.search import HBACallback
from hba_fastai.session import digits_net
from hba_fastai.data import digits_dls
from hba_fastai.pba import PBAPolicy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

class NoValid(Callback):
    def before_validate(self): raise CancelValidException

def flops(cb, model=None):
    learn = Learner(digits_dls(400, 200, bs=50), model or digits_net())
    with learn.no_bar(),learn.no_logging(),FlopCounterMode(display=False) as n: learn.fit(1, cbs=[NoValid(), *cb])
    return n.get_total_flops()

def test_what_a_search_costs():
    """A hyper-step is a forward pass and a backward pass without the gradients of the weights, 2/3 of a training step, after every
    fourth one, or every second in the paper's form. The first batch norm sees few channels"""
    plain = flops([])
    assert flops([HBACallback(warmup=0)]) < (1 + 2/3/4 + 0.02)*plain
    assert 1.25*plain < flops([HBACallback.paper()]) < (1 + 2/3/2 + 0.02)*plain # so the count sees the hyper-steps

class Calls(TorchDispatchMode):
    def __init__(self): super().__init__(); self.n = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += 1
        return func(*args, **(kwargs or {}))

def calls(b, size, policy, dtype=torch.uint8):
    g = torch.Generator().manual_seed(0)
    x = (torch.rand(b, 3, size, size, generator=g)*255).to(dtype)
    with Calls() as c: policy.apply(x, policy.draw_under(policy.space.start().expand(b,-1), g))
    return c.n

class Eight(PBAPolicy): copies = 8

def test_calls_of_a_batch_do_not_grow_with_it():
    policy = PBAPolicy()
    few,many = calls(128, 16, policy),calls(512, 16, policy)
    assert many < 1.15*few and calls(128, 32, policy) < 1.1*few # a loop over samples would be 4 times as many
    assert few < 600
    assert calls(128, 16, Eight()) < 1.1*few # H = 216 instead of 54
