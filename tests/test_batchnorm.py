"""Batch norm with numbers of each sample against the operations of torch one by one

Bounds. Both ways work out x̂ = (x-μ)/σ and sums of products with it, and differ in the order of the operations.
A sum of n numbers of size 1 is off by at most n roundings, n ≤ 1,000 here: 1,000·2⁻⁵³ = 1.1e-13 of the largest number
of a tensor, and 1,000·2⁻²⁴ = 6e-5 in float32. Means μ of up to 3σ, taken off x, make that up to 4 times as large."""
import copy
import pytest, torch
from torch import nn
from torch.autograd import gradcheck
from hba_fastai import hyper
from hba_fastai.batchnorm import batch_norm
from hba_fastai.hyper import HyperLayer

BOUND = {torch.float64: 5e-13, torch.float32: 2.4e-4}
MAKE = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
SHAPES = [(7,4),(6,4,9),(5,4,6,7),(3,4,5,3,4),(1,4,6,7),(6,1,5,5)]

def close(a, b):
    "Are `a` and `b` equal but for rounding?"
    assert (a is None)==(b is None)
    return a is None or a.dtype==b.dtype and a.shape==b.shape and bool((a-b).abs().max() <= BOUND[a.dtype]*b.abs().max())

def plain_path(monkeypatch): monkeypatch.setattr(hyper, 'batch_norm', lambda *args: None)

def build(shape, dtype=torch.float64, frozen=(), **kw):
    "A batch norm with all its numbers random, its hyper-layer at random rows z (unless `rows` says 1), and an input off zero"
    torch.manual_seed(0)
    rows = kw.pop('rows', shape[0])
    m = MAKE[len(shape)](shape[1], **kw).to(dtype)
    for p in m.parameters(): nn.init.uniform_(p, 0.5, 2)
    if m.running_mean is not None: m.running_mean.normal_(); m.running_var.uniform_(0.5, 2)
    h = HyperLayer(m, 3)
    for v in h.V.values(): nn.init.normal_(v)
    for k in frozen:
        for p in (getattr(m, k, None),h.U.get(k),h.V.get(k)):
            if p is not None: p.requires_grad_(False)
    h.z = torch.randn(rows, 3).to(dtype)
    x = (torch.randn(shape) + 3*torch.rand(shape[1]).view(1, -1, *[1]*(len(shape)-2))).to(dtype)
    return m,h,x

def everything(m, h, x, times=2):
    "Output and gradients after `times` passes of `x`, buffers, and the output with its way back"
    x = x.detach().requires_grad_(x.requires_grad)
    wanted = [*m.parameters(),*h.U.values(),*h.V.values()]
    up = torch.linspace(-1, 1.5, x.numel(), dtype=x.dtype).sin().view_as(x)
    for _ in range(times): out = h.forward(x)
    wanted = [p for p in ([x] if x.requires_grad else [])+wanted if p.requires_grad]
    grads = torch.autograd.grad((out*up).sum(), wanted, allow_unused=True)
    return [out.detach(),*grads],[b.clone() for b in m.buffers()],out

def compare(monkeypatch, m, h, x, own=True):
    "Ours against the operations of torch; `own`: is ours what runs?"
    twin = copy.deepcopy((m,h,h.z))
    twin[1].z,twin = twin[2],twin[:2]
    got,buffers,out = everything(m, h, x)
    assert ('_PerSample' in names(out.grad_fn))==own
    plain_path(monkeypatch)
    want,same,_ = everything(*twin, x)
    assert len(got)==len(want) and all(close(g, w) for g,w in zip(got, want))
    assert len(buffers)==len(same) and all(torch.equal(a, b) for a,b in zip(buffers, same)) # the statistics, to the last bit

def names(f):
    "Names of the nodes on the way back from `f`"
    return '' if f is None else f.name()+''.join(names(g) for g,_ in f.next_functions)

KW = {'default': {}, 'mean of all batches': dict(momentum=None), 'no statistics': dict(track_running_stats=False), 'no bias': dict(bias=False)}

@pytest.mark.parametrize('dtype', [torch.float64,torch.float32])
@pytest.mark.parametrize('kw', KW.values(), ids=KW)
@pytest.mark.parametrize('shape', SHAPES)
def test_as_torch_does_it_one_by_one(shape, kw, dtype, monkeypatch):
    compare(monkeypatch, *with_grad(build(shape, dtype, **kw)))

def with_grad(o): return *o[:2],o[2].requires_grad_()

@pytest.mark.parametrize('shape', [(5,4,6,7),(3,4,5,3,4)])
def test_channels_last(shape, monkeypatch):
    m,h,x = build(shape)
    form = torch.channels_last if len(shape)==4 else torch.channels_last_3d
    x = x.to(memory_format=form).requires_grad_()
    assert h.forward(x).is_contiguous(memory_format=form)
    compare(monkeypatch, m, h, x)

@pytest.mark.parametrize('view', [lambda x: x[:,::2], lambda x: x[::2], lambda x: x.mT, lambda x: x[...,0,0], lambda x: x[...,0,0].mT])
def test_inputs_that_are_views(view, monkeypatch):
    x = view(torch.randn(6,8,5,5).double())
    assert not x.is_contiguous() or x.dim()==4
    m,h,_ = build(tuple(x.shape))
    compare(monkeypatch, m, h, x.requires_grad_())

@pytest.mark.parametrize('frozen', [(),('weight',),('bias',),('weight','bias')])
@pytest.mark.parametrize('x_too', [False,True])
def test_gradients_that_nobody_wants(frozen, x_too, monkeypatch):
    m,h,x = build((5,4,6,7), frozen=frozen)
    if len(frozen)==2 and not x_too: return # nothing to differentiate
    compare(monkeypatch, m, h, x.requires_grad_(x_too))

@pytest.mark.parametrize('training', [True,False])
def test_statistics_that_are_kept_but_no_longer_tracked(training, monkeypatch):
    m,h,x = build((5,4,6,7))
    m.train(training).track_running_stats = False
    compare(monkeypatch, *with_grad((m,h,x)), own=training)
    assert m.num_batches_tracked==0

def test_inputs_of_other_dimensions_are_refused_as_torch_does():
    m,h,_ = build((6,4,9))
    with pytest.raises(ValueError, match='expected 2D or 3D input'): h.forward(torch.rand(6,4,3,3).double())

def test_one_row_for_all(monkeypatch): compare(monkeypatch, *with_grad(build((5,4,6,7), rows=1)))

def test_finite_differences():
    for shape in SHAPES:
        m,h,x = build(shape)
        w,b = (torch.randn(*shape[:2], *[1]*(len(shape)-2)).double().requires_grad_() for _ in range(2))
        assert gradcheck(lambda x,w,b: batch_norm(m, x, w, b), (x.requires_grad_(),w,b))
        assert gradcheck(lambda x,w: batch_norm(m, x, w), (x,w[:1].detach().requires_grad_()))

@pytest.mark.parametrize('kw', KW.values(), ids=KW)
def test_a_hyper_step_sees_a_plain_layer_with_other_weights(kw, monkeypatch):
    "Eval mode, one row: no gradient of ours, and the statistics stay"
    m,h,x = build((5,4,6,7), rows=1, **kw)
    m.eval()
    before = copy.deepcopy(m.state_dict())
    compare(monkeypatch, m, h, x.requires_grad_(), own=m.running_mean is None)
    assert all(torch.equal(v, before[k]) for k,v in m.state_dict().items())

def test_what_torch_does_itself(monkeypatch):
    "Rows in eval mode, half precision, other devices, one number in each channel"
    m,h,x = build((5,4,6,7))
    term = lambda rows,x: torch.ones(rows,4,1,1, dtype=x.dtype, device=x.device)
    assert batch_norm(m, x, term(5, x)) is not None
    for odd in (x.bfloat16(),x.half(),x.float().to('meta')): assert batch_norm(m, odd, term(5, odd)) is None
    for odd in (x.bfloat16(),x.float()): assert batch_norm(m, odd, term(5, x)) is None
    assert batch_norm(m, x[:1,:,:1,:1], term(1, x)) is None and batch_norm(m, x[:0], term(0, x)) is None
    assert batch_norm(m.eval(), x, term(5, x)) is None and m.num_batches_tracked==1
    compare(monkeypatch, *with_grad((m,h,x)), own=False)

def test_classes_of_others_keep_their_forward(monkeypatch):
    class Twice(nn.BatchNorm2d):
        def forward(self, x): return 2*super().forward(x)
    monkeypatch.setitem(MAKE, 4, Twice)
    m,h,x = build((5,4,6,7))
    assert '_PerSample' not in names(h.forward(x.requires_grad_()).grad_fn)

@pytest.mark.parametrize('inside', [False,True]) # is the way back within autocast?
def test_autocast_leaves_it_alone(inside):
    m,_,x = build((5,4,6,7), torch.float32)
    ts = [x.requires_grad_(),*(torch.rand(5,4,1,1, requires_grad=True) for _ in range(2))]
    def run(forward, back):
        with torch.autocast('cpu', torch.bfloat16, enabled=forward): out = batch_norm(m, *ts)
        with torch.autocast('cpu', torch.bfloat16, enabled=back): return out,*torch.autograd.grad(out.square().sum(), ts)
    for got,want in zip(run(True, inside), run(False, False)): assert got.dtype==torch.float32 and torch.equal(got, want)

def test_half_precision_under_autocast_is_torchs():
    m,h,x = build((5,4,6,7), torch.float32)
    with torch.autocast('cpu', torch.bfloat16): out = h.forward(nn.Conv2d(4,4,1)(x))
    assert '_PerSample' not in names(out.grad_fn) and out.isfinite().all()

def test_the_next_layer_may_work_in_place():
    m,h,x = build((5,4,6,7))
    x.requires_grad_()
    got,want = (torch.autograd.grad(nn.ReLU(inplace)(h.forward(x)).square().sum(), x)[0] for inplace in (True,False))
    assert torch.equal(got, want)

def test_an_input_that_was_changed_is_noticed():
    m,h,x = build((5,4,6,7))
    x = x.requires_grad_()*1
    out = h.forward(x)
    with torch.no_grad(): x.add_(1)
    with pytest.raises(RuntimeError, match='modified by an inplace operation'): out.sum().backward()

def test_a_second_derivative_is_refused():
    m,h,x = build((5,4,6,7))
    g, = torch.autograd.grad(h.forward(x.requires_grad_()).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match='differentiate twice'): g.sum().backward()

def test_calls_by_function(monkeypatch):
    "`torch.func`: other weights and buffers for one call, and its gradient"
    m,h,x = build((5,4,6,7))
    h.attach()
    ps = {k: v.detach()*1.5 for k,v in m.named_parameters()}
    buffers = {k: v.clone() for k,v in m.named_buffers()}
    kept = copy.deepcopy(m.state_dict())
    call = lambda ps,buffers: torch.func.functional_call(m, {**ps, **buffers}, x)
    def loss(ps): return call(ps, {k: v*1 for k,v in buffers.items()}).square().sum()
    got,out = torch.func.grad(loss)(ps),call(ps, buffers)
    assert all(torch.equal(v, kept[k]) for k,v in m.state_dict().items()) and buffers['num_batches_tracked']==1
    plain_path(monkeypatch)
    want = torch.func.grad(loss)(ps)
    assert all(close(got[k], want[k]) for k in ps) and close(out, call(ps, buffers))
    h.detach()
