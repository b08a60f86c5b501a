"Hyper-layers against the naive per-sample network of Eq. 20/24/26, the fold, and the hypergradient against finite differences; all in float64"
import copy
from contextlib import ExitStack,contextmanager
import pytest, torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d,GroupNormAct,LayerNorm2d,RmsNorm,RmsNorm2d,ScaledStdConv2d,ScaledStdConv2dSame
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint
from hba_fastai.exploit import descend
from hba_fastai.hyper import HyperLayer
from hba_fastai.hypernet import HyperNet
from hba_fastai.lam import Hyperparameters
from hba_fastai.layers import select
from hba_fastai.modules import evaluating
from hba_fastai.pba import PBAPolicy
from hba_fastai.space import PBASpace

def without_bias(m): m.bias = None; return m # torch before 2.9 has no argument for it in a batch norm

LAYERS = {
    'Conv1d': (lambda: nn.Conv1d(4,6,3,padding=1), (4,9)),
    'Conv2d': (lambda: nn.Conv2d(4,6,3,2,1,groups=2), (4,9,7)),
    'Conv2d reflect': (lambda: nn.Conv2d(4,6,3,padding=1,padding_mode='reflect',bias=False), (4,9,7)),
    'Conv3d': (lambda: nn.Conv3d(4,6,3), (4,5,5,5)),
    'Linear': (lambda: nn.Linear(4,6), (4,)),
    'Linear tokens': (lambda: nn.Linear(4,6,bias=False), (5,4)),
    'BatchNorm1d': (lambda: nn.BatchNorm1d(4), (4,)),
    'BatchNorm1d seq': (lambda: nn.BatchNorm1d(4), (4,6)),
    'BatchNorm2d': (lambda: nn.BatchNorm2d(4), (4,6,5)),
    'BatchNorm2d no bias': (lambda: without_bias(nn.BatchNorm2d(4)), (4,6,5)),
    'BatchNorm3d': (lambda: nn.BatchNorm3d(4), (4,3,3,3)),
    'GroupNorm': (lambda: nn.GroupNorm(2,4), (4,6,5)),
    'InstanceNorm2d': (lambda: nn.InstanceNorm2d(4,affine=True), (4,6,5)),
    'LayerNorm': (lambda: nn.LayerNorm(4), (6,4)),
    'LayerNorm no bias': (lambda: nn.LayerNorm(4,bias=False), (6,4)),
    'LayerNorm 2 dims': (lambda: nn.LayerNorm((6,4)), (3,6,4)),
    'RMSNorm': (lambda: nn.RMSNorm(4), (6,4)),
    'timm RmsNorm': (lambda: RmsNorm(4), (6,4)),
    'timm RmsNorm2d': (lambda: RmsNorm2d(4), (4,6,5)),
    'timm LayerNorm2d': (lambda: LayerNorm2d(4), (4,6,5)),
    'timm GroupNormAct': (lambda: GroupNormAct(4,2), (4,6,5)),
    'timm BatchNormAct2d': (lambda: BatchNormAct2d(4), (4,6,5)),
    'timm Conv2dSame': (lambda: Conv2dSame(4,6,3,2), (4,9,7)),
    'timm ScaledStdConv2d': (lambda: ScaledStdConv2d(4,6,3), (4,9,7)),
    'timm ScaledStdConv2dSame': (lambda: ScaledStdConv2dSame(4,6,3,2), (4,9,7))}

@pytest.fixture
def attach():
    "`attach(net)`, or `attach(net, z)` where z(λ) is not 0, until the end of the test"
    with ExitStack() as stack:
        yield lambda net,z=None: stack.enter_context(net.attached(torch.zeros(net.n) if z is None else z))

@contextmanager
def at(net, z):
    "The network at `z`, rows of it"
    net.respond(z)
    try: yield
    finally: net.respond(None)

def make(name, n=7, b=5, mode=True):
    "A layer with random affine part, a plain copy, a hypernetwork of it, inputs and rows z"
    torch.manual_seed(0)
    layer = LAYERS[name][0]().double().train(mode)
    for p in layer.parameters(): nn.init.normal_(p)
    x,z = torch.randn(b,*LAYERS[name][1]).double(),torch.randn(b,n).double()
    return layer,copy.deepcopy(layer),HyperNet([('layer',layer)], n),x,z

def randomise(net):
    for p,_ in net.params: nn.init.normal_(p)

def weights(plain, net, z):
    "Weight and bias of the paper's hypernetwork at the deviation z, by the equations"
    l, = net.layers
    def at(k):
        p,u,v = getattr(plain,k),l.U[k],l.V[k]
        if v.shape[0]==u.numel(): return p + (v@z).view_as(u)*u # each weight is a row of its own, as in Eq. 26
        return p + (torch.diag(v@z)@u.flatten(1 if u.dim()>1 else 0)).view_as(u) # φ0 + diag(φ_V z) φ_U
    return {k: at(k) for k in l.U}

@pytest.mark.parametrize('mode', [True,False])
@pytest.mark.parametrize('name', LAYERS)
def test_batched_equals_naive_per_sample(name, mode, attach):
    layer,plain,net,x,z = make(name, mode=mode)
    attach(net)
    randomise(net)
    with at(net, z): got = layer(x)
    call = torch.func.functional_call
    if isinstance(plain, _BatchNorm) and mode: # statistics are the batch's: run it whole with each sample's weights
        rows = [call(copy.deepcopy(plain), weights(plain,net,z[i]), x)[i] for i in range(len(x))]
    else: rows = [call(plain, weights(plain,net,z[i]), x[i:i+1])[0] for i in range(len(x))]
    assert (got-torch.stack(rows)).abs().max() < 1e-10

@pytest.mark.parametrize('name', LAYERS)
def test_attached_changes_nothing_and_gives_the_plain_layer_back(name):
    layer,plain,net,x,z = make(name)
    with net.attached(torch.zeros(7)):
        with at(net, z): y = layer(x)
        assert (y-plain(x)).abs().max() < 1e-12 # φ_V = 0; norm layers are computed in another order
        assert torch.equal(layer(x), copy.deepcopy(plain)(x)) or isinstance(plain, _BatchNorm)
        assert list(layer.state_dict())==list(plain.state_dict())
    assert 'forward' not in vars(layer) and type(layer) is type(plain) and vars(layer).keys()==vars(plain).keys()

@pytest.mark.parametrize('name', LAYERS)
def test_a_move_gives_the_uncentred_network(name, attach):
    "λ → λ+Δ: the plain layer becomes θ̂(λ+Δ) of the un-centred form with φ0 = weight - diag(φ_V λ) φ_U"
    layer,plain,net,x,z = make(name)
    lam,delta = z[0],z[1]
    attach(net, lam)
    randomise(net)
    phi0 = {k: w for k,w in weights(plain, net, -lam).items()}
    net.move_to(lam+delta)
    holder = copy.deepcopy(plain)
    for k,w in phi0.items(): getattr(holder,k).data.copy_(w)
    for k,w in weights(holder, net, lam+delta).items(): assert (getattr(layer,k)-w).abs().max() < 1e-10

@pytest.mark.parametrize('name', ['Conv2d','Linear','BatchNorm2d','LayerNorm'])
def test_gradients_of_phi_are_those_of_the_naive_network(name, attach):
    layer,plain,net,x,z = make(name, mode=False)
    attach(net)
    randomise(net)
    t = torch.randn_like(plain(x))
    ps = [p for p,_ in net.params]
    with at(net, z): got = torch.autograd.grad((layer(x)*t).sum(), ps)
    rows = torch.stack([torch.func.functional_call(plain, weights(plain,net,z[i]), x[i:i+1])[0] for i in range(len(x))])
    for g,w in zip(got, torch.autograd.grad((rows*t).sum(), ps)): assert (g-w).abs().max() < 1e-9

def tiny():
    torch.manual_seed(1)
    first = nn.Conv2d(3,4,3),nn.BatchNorm2d(4),nn.Tanh(),nn.Conv2d(4,5,3),nn.GroupNorm(1,5),nn.Tanh()
    return nn.Sequential(*first, nn.Flatten(1), nn.Dropout(0.5), nn.LazyLinear(3)).double()

# --- the hypergradient

@pytest.mark.parametrize('strategy', ['first_bn','conv+bn','all'])
@pytest.mark.parametrize('condition', ['lambda','dose'])
def test_hypergradient_equals_finite_differences(condition, strategy, attach, h=1e-4):
    model,x,y,policy = tiny(),torch.rand(9,3,8,8).double(),torch.randint(0,3,(9,)),PBAPolicy()
    model(x); model[1].running_mean.normal_(); model[1].running_var.uniform_(0.5,2)
    lam = PBASpace().start(0.05).double() + 0.5*torch.randn(54).double()
    z = (lambda l: l) if condition=='lambda' else policy.expected
    net = attach(HyperNet(select(model, (x,), strategy).layers, len(z(lam))), z(lam))
    randomise(net)
    before = copy.deepcopy(model.state_dict())
    loss = lambda: F.cross_entropy(model(x), y)
    l,g = net.hypergradient(model, loss, lam, z)
    def loss_at(lam2):
        with evaluating(model),torch.no_grad(),at(net, z(lam2)[None]): return loss()
    fd = torch.stack([(loss_at(lam+e)-loss_at(lam-e))/(2*h) for e in h*torch.eye(54).double()])
    assert (g-fd).abs().max() < 1e-5*g.abs().max() + 1e-8 # O(h²) of the difference, and rounding over 2h
    assert g.abs().min() > 0 and l==loss_at(lam)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and all(p.grad is None for p in model.parameters()) and model.training
    assert torch.allclose(net.hypergradient(model, loss, lam, z, scale=1024.)[1], g, rtol=1e-12)

@pytest.mark.parametrize('centred', [True,False])
@pytest.mark.parametrize('condition', ['lambda','dose'])
def test_moves_of_a_hyper_step_follow_z(condition, centred, attach, h=1e-5):
    """Each by the chain rule: ∂L/∂z of the one batch, as differences of the loss have it, times ∂z/∂λ where λ is then. The differences
    are off by h², 1e-10, and by rounding over h, 1e-11, of losses near 1; Adam divides by the gradient, which is 1e-3 at least"""
    model,x,y,policy = tiny(),torch.rand(9,3,8,8).double(),torch.randint(0,3,(9,)),PBAPolicy()
    start = PBASpace().start(0.05).double() + 0.5*torch.randn(54).double()
    z,loss = (lambda l: l) if condition=='lambda' else policy.expected,lambda: F.cross_entropy(model(x), y)
    net = attach(HyperNet(select(model, (x,), 'first_bn').layers, len(z(start)), centred=centred), z(start))
    randomise(net)
    net.hold_phi0(True)
    z0 = z(start)
    up,down = (net.losses_at(model, loss, [z0+s*e for e in torch.eye(len(z0)).double()]) for s in (h,-h))
    own,lam = Hyperparameters(start, groups=[54]),Hyperparameters(start, groups=[54])
    for i in range(3): own.step(torch.autograd.functional.jacobian(z, own.value).T@(up-down)/(2*h), 0.1)
    value,ok = descend(net, model, loss, lam, z, 0.1, moves=3)
    assert value==net.losses_at(model, loss, [z0])[0] and ok and len(lam.series)==1 and torch.allclose(lam.series[0], own.series[0], atol=1e-8)
    assert (lam.value-own.value).abs().max()<1e-6 and (lam.value-start).abs().max()>0.2
    assert condition=='lambda' or (own.series[2]-own.series[0]).abs().max()>1e-2*own.series[0].abs().max() # z bends

# --- the two forms

def two_forms(strategy='bn'):
    "The same network and φ twice, centred and not; λ, a batch and its rows"
    torch.manual_seed(2)
    first,x,lam = tiny(),torch.rand(6,3,8,8).double(),torch.randn(54).double()
    first(x)
    models = [first,copy.deepcopy(first)]
    centred,un = (HyperNet(select(m, (x,), strategy).layers, 54, centred=c) for m,c in zip(models, (True,False)))
    randomise(centred)
    for p,_ in centred.params: p.data.mul_(0.1)
    for p,q in zip(un.params, centred.params): p[0].data.copy_(q[0])
    return models,(centred,un),x,lam,lam+0.5*torch.randn(6,54).double()

@pytest.mark.parametrize('strategy', ['bn','conv+bn','all'])
def test_both_forms_are_the_same_network(strategy, attach):
    "Outputs, hypergradients, moves and the plain network at the end, in float64: they differ by rounding alone"
    models,nets,x,lam,z = two_forms(strategy)
    seen,moved = [],lam-0.1
    for model,net in zip(models, nets):
        model[7].p = 0. # dropout would draw twice
        with net.attached(lam):
            net.hold_phi0(True)
            with at(net, z): out = model(x)
            l,g = net.hypergradient(model, lambda: F.cross_entropy(model(x), torch.arange(6)%3), lam, lambda l: l)
            net.move_to(moved)
            with at(net, z): then = model(x)
        seen.append([out,l,g,then,*model.state_dict().values()])
    for a,b in zip(*seen): assert torch.allclose(a, b, rtol=1e-9, atol=1e-11)
    assert (seen[0][0]-seen[0][3]).abs().max()<1e-11 # the network of a row does not depend on where λ is

def test_uncentred_layers_hold_phi0_by_the_equation(attach):
    layer,plain,net,x,z = make('Conv2d')
    net.centred = False
    attach(net, z[0])
    randomise(net)
    net.hold_phi0(True); net.hold_phi0(True) # the second time nothing is left to do
    want = weights(plain, net, -z[0])
    for k,w in want.items(): assert (getattr(layer,k)-w).abs().max() < 1e-12
    net.move_to(z[1]) # φ0 stays
    for k,w in want.items(): assert (getattr(layer,k)-w).abs().max() < 1e-12
    net.hold_phi0(False)
    for k,w in weights(plain, net, z[1]-z[0]).items(): assert (getattr(layer,k)-w).abs().max() < 1e-10

class Cut(Exception): pass

def cut(n):
    "A tensor's `copy_` that fails at the n-th call"
    left,copy_ = [n],torch.Tensor.copy_
    def failing(self, *args, **kwargs):
        left[0] -= 1
        if left[0]==0: raise Cut
        return copy_(self, *args, **kwargs)
    return failing

@pytest.mark.parametrize('n', range(1,7)) # 2 convolutions and a batch norm, weight and bias of each
@pytest.mark.parametrize('step', ['hold','move'])
def test_a_move_that_was_cut_short_is_finished(step, n, monkeypatch):
    (_,model),(_,net),x,lam,z = two_forms('conv+bn')
    net.centred = step=='move'
    plain = copy.deepcopy(model.state_dict())
    target = lam+0.3 if step=='move' else lam
    def whole():
        with net.attached(lam):
            net.hold_phi0(True)
            net.move_to(target)
        return copy.deepcopy(model.state_dict())
    want = whole()
    model.load_state_dict(plain)
    with pytest.raises(Cut),net.attached(lam):
        monkeypatch.setattr(torch.Tensor, 'copy_', cut(n))
        try: net.hold_phi0(True) if step=='hold' else net.move_to(target)
        finally: monkeypatch.undo()
    for k,v in model.state_dict().items(): assert torch.equal(v, want[k]), k
    assert torch.equal(net.ref, target) and not net.holds_phi0 and all('forward' not in vars(m) for m in model.modules())

@pytest.mark.parametrize('held', [False,True])
@pytest.mark.parametrize('centred', [True,False])
def test_whatever_fails_leaves_the_plain_network(centred, held):
    models,nets,x,lam,z = two_forms('conv+bn')
    model,net = (o[0 if centred else 1] for o in (models,nets))
    before = copy.deepcopy({k:v for k,v in model.state_dict().items() if 'running' not in k and 'num' not in k})
    with pytest.raises(ValueError, match='got a batch of 6 and the augmentation was drawn for 2'),net.attached(lam):
        net.hold_phi0(held)
        net.respond(z[:2])
        model(x)
    for k,v in before.items(): assert torch.allclose(model.state_dict()[k], v, rtol=1e-13, atol=1e-14), k # off and on again
    assert all(l.z is None for l in net.layers) and all('forward' not in vars(m) for m in model.modules())

def test_a_saved_response_goes_on():
    _,(net,_),x,lam,z = two_forms('conv+bn')
    assert 'ref' not in net.state_dict()
    with net.attached(lam): pass
    saved = copy.deepcopy(net.state_dict())
    assert {k for k in saved if k[0]=='1'}=={'1.U.weight','1.V.weight','1.U.bias','1.V.bias'} and torch.equal(saved['ref'], lam)
    (_,model),(_,other),*_ = two_forms('conv+bn')
    plain = copy.deepcopy(model.state_dict())
    for p,_ in other.params: p.data.zero_()
    with other.attached(0*lam):
        other.hold_phi0(True)
        other.load_state_dict(saved) # the layers hold φ0 of the new φ
        assert other.holds_phi0 and not torch.equal(model[0].weight, plain['0.weight'])
    for k,v in other.state_dict().items(): assert torch.equal(v, saved[k]), k
    for k,v in model.state_dict().items(): assert torch.allclose(v, plain[k], rtol=1e-13, atol=1e-14), k

@pytest.mark.parametrize('change,match', [
    (lambda d: d.pop('1.V.bias'), 'has nothing for `1.V.bias` and these hyper-layers need \\(4, 54\\)'),
    (lambda d: d.update({'9.U.weight': torch.ones(3)}), 'has \\(3,\\) for `9.U.weight` and these hyper-layers need nothing'),
    (lambda d: d.update({'1.V.bias': torch.ones(4,27)}), 'has \\(4, 27\\) for `1.V.bias` and these hyper-layers need \\(4, 54\\)'),
    (lambda d: d.update(ref=torch.ones(27)), 'has \\(27,\\) for `ref` and these hyper-layers need \\(54,\\)')])
def test_a_response_of_other_layers_is_refused(change, match):
    _,(net,_),*_ = two_forms()
    before = copy.deepcopy(net.state_dict())
    d = {k: v+1 for k,v in before.items()}
    change(d)
    with pytest.raises(ValueError, match=match): net.load_state_dict(d)
    assert all(torch.equal(v, before[k]) for k,v in net.state_dict().items())

# --- layers that do not fit

def test_first_is_the_first_that_runs():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.late,self.early = nn.BatchNorm2d(3),nn.BatchNorm2d(3)
        def forward(self, x): return self.late(self.early(x))
    assert [n for n,_ in select(M(), (torch.rand(2,3,4,4),), 'first_bn').layers]==['early']

def test_batch_dimension_that_changes_is_refused(attach):
    class Fold(nn.Module):
        def forward(self, x): return x.view(-1, 1, *x.shape[2:])
    model = nn.Sequential(nn.BatchNorm2d(3), Fold(), nn.BatchNorm2d(1))
    assert len(select(model, (torch.rand(2,3,4,4),), 'first_bn').layers)==1
    with pytest.raises(ValueError, match='`2` sees a batch of 6 where the model got 2'): select(model, (torch.rand(2,3,4,4),), 'bn')
    net = attach(HyperNet([('2', model[2])], 4))
    with at(net, torch.zeros(2,4)),pytest.raises(ValueError, match='got a batch of 6 and the augmentation was drawn for 2'):
        model(torch.rand(2,3,4,4))

def test_deepcopy_of_an_attached_model_is_its_own(attach):
    "As averaging callbacks do: the copy must not run through the original's weights"
    model = tiny(); x = torch.rand(4,3,8,8).double(); model(x)
    attach(HyperNet(select(model, (x,), 'first_conv').layers, 6))
    twin = copy.deepcopy(model)
    with torch.no_grad(): twin[0].weight.zero_(); twin[0].bias.zero_()
    assert twin[0](x).abs().max()==0 and model[0](x).abs().max()>0

@pytest.mark.parametrize('strategy,match', [
    ('first_bn','matches no layer of Sequential, whose layers are: 1 Conv2d, 1 Linear'), ('frist_bn','unknown'),
    ([nn.Linear(2,2)],'matches no layer'), (lambda m: False,'matches no layer')])
def test_strategies_that_do_not_fit(strategy, match):
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.Flatten(), nn.Linear(16,2))
    with pytest.raises(ValueError, match=match): select(model, (torch.rand(2,3,4,4),), strategy)

@pytest.mark.parametrize('training', [True,False])
def test_a_frozen_batch_norm_responds_too(training, attach):
    "As with `train_bn=False` and BnFreeze: the layer is in eval mode and its weights are frozen, in a model that trains"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*36,2)).double().train(training)
    model[1].eval().requires_grad_(False)
    x,z = torch.rand(5,3,8,8).double(),torch.randn(5,3).double()
    stats = copy.deepcopy(model[1].state_dict())
    net = attach(HyperNet(select(model, (x,)).layers, 3))
    for p,_ in net.params: nn.init.normal_(p)
    with at(net, z): moved = model(x)
    assert (moved-model(x)).abs().amin(1).min() > 1e-6 # of each sample
    moved.square().sum().backward()
    assert all(p.grad.abs().max()>0 for p,_ in net.params) and model[1].weight.grad is None
    assert all(torch.equal(v, stats[k]) for k,v in model[1].state_dict().items())

# --- gradient checkpointing

class Checkpointed(nn.Module):
    "Blocks that run again on the way back; `how` are the arguments of `checkpoint`, None for none"
    def __init__(self, how):
        super().__init__()
        torch.manual_seed(2)
        self.stem,self.how = nn.Conv2d(3,4,3),how
        block = lambda i: nn.Sequential(nn.Conv2d(4,4,3,padding=1), nn.BatchNorm2d(4) if i else nn.GroupNorm(1,4), nn.Tanh())
        self.blocks = nn.ModuleList(block(i) for i in range(3))
        self.head = nn.Linear(4,3)
    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks: x = b(x) if self.how is None else checkpoint(b, x, **self.how)
        return self.head(x.mean((2,3)))

HOW = {'not reentrant': dict(use_reentrant=False), 'reentrant': dict(use_reentrant=True)}
first_warns = pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad') # in the forward pass of `select`, by torch

def checkpointed(attach, how, strategy='norm'):
    "A network with its hypernetwork, attached, and its loss"
    model,g = Checkpointed(how).double(),torch.Generator().manual_seed(0)
    x,y = torch.rand(6,3,8,8, generator=g).double(),torch.arange(6)%3
    net = attach(HyperNet(select(model, (x,), strategy).layers, 5))
    torch.manual_seed(3)
    randomise(net)
    return model,net,lambda: F.cross_entropy(model(x), y)

@first_warns
@pytest.mark.parametrize('how', HOW.values(), ids=HOW)
def test_checkpointing_leaves_the_gradients_of_phi_as_they_are(how, attach):
    grads = []
    for h in (None,how):
        _,net,loss = checkpointed(attach, h)
        net.respond(torch.randn(6,5, generator=torch.Generator().manual_seed(4)).double())
        loss().backward()
        net.respond(None)
        grads.append([p.grad for p,_ in net.params])
    assert all(g.abs().max()>0 and torch.allclose(g, w, rtol=1e-12, atol=1e-14) for g,w in zip(*grads))

def test_hypergradient_through_checkpointed_blocks(attach):
    lam = torch.randn(5).double()
    nets = [checkpointed(attach, how) for how in (None,HOW['not reentrant'])]
    (l,g),(l2,g2) = (net.hypergradient(model, loss, lam, lambda l: l) for model,net,loss in nets)
    assert g.abs().min()>0 and torch.equal(l, l2) and torch.allclose(g, g2, rtol=1e-12)

def everything(model):
    tensors = [*(t.clone() for t in model.state_dict().values()),torch.get_rng_state()]
    return tensors,[m.training for m in model.modules()],[p.grad for p in model.parameters()]

@first_warns
@pytest.mark.parametrize('how,match', [(None,None), (HOW['not reentrant'],None), (HOW['reentrant'],'use_reentrant=False')])
@pytest.mark.parametrize('strategy', ['norm','first_conv'])
def test_a_trial_refuses_what_has_no_hypergradient_and_leaves_everything_as_it_is(how, match, strategy, attach):
    model,net,loss = checkpointed(attach, how, strategy)
    model.head = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), model.head).double()
    noisy,before = lambda: loss()*torch.rand(()),everything(model)
    if match:
        with pytest.raises(ValueError, match=match): net.check(model, noisy)
    else: net.check(model, noisy)
    after = everything(model)
    assert all(torch.equal(a, b) for a,b in zip(before[0], after[0])) and before[1:]==after[1:] and all(l.z is None for l in net.layers)

@first_warns
def test_a_trial_sees_a_layer_that_the_gradient_misses():
    "The only checkpointed block gets no input that requires gradients, so torch gives its parameters none, and says nothing"
    class First(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4))
            self.rest = nn.Sequential(nn.Conv2d(4,4,3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*16,2))
        def forward(self, x): return self.rest(checkpoint(self.body, x, use_reentrant=True))
    model,x,z = First(),torch.rand(3,3,8,8),torch.zeros(5)
    loss = lambda: model(x).square().mean()
    with HyperNet(select(model, (x,), 'bn').layers, 5).attached(z) as net,pytest.raises(ValueError, match='reaches the hyper-layer `body.1`'):
        net.check(model, loss)
    with HyperNet([('rest.1',model.rest[1])], 5).attached(z) as net: net.check(model, loss)

# --- life of a HyperNet

def test_constructors_change_nothing_and_failures_undo_themselves():
    model = tiny(); x = torch.rand(4,3,8,8).double(); model(x)
    rng,names,z = torch.get_rng_state(),[sorted(vars(m)) for m in model.modules()],torch.zeros(6)
    net = HyperNet(select(model, (x,), 'all').layers, 6)
    same = lambda: names==[sorted(vars(m)) for m in model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert same()
    with HyperNet(select(model, (x,), [model[1]]).layers, 6).attached(z):
        with pytest.raises(ValueError, match='`1` responds to a search already'),net.attached(z): pass
        assert 'forward' not in vars(model[0]) and 'forward' in vars(model[1])
    assert same()
    with pytest.raises(KeyError),net.attached(z): raise KeyError
    assert same()

def test_a_forward_of_the_user_is_put_back():
    bn = nn.BatchNorm2d(3)
    mine = lambda x: 2*nn.BatchNorm2d.forward(bn, x)
    bn.forward = mine
    x = torch.rand(4,3,5,5)
    net = HyperNet([('bn',bn)], 2)
    with net.attached(torch.zeros(2)):
        assert bn.forward is not mine and torch.equal(bn(x), mine(x))
        with at(net, torch.zeros(4,2)): assert not torch.allclose(bn(x), nn.BatchNorm2d(3)(x)) # what it adds is kept
    assert bn.forward is mine

def test_phi_go_on_where_shapes_agree_and_begin_anew_elsewhere():
    def net(width, n=5, like=None, seed=0):
        model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Conv2d(4,width,3))
        return HyperNet(select(model, (torch.rand(2,3,8,8),), 'all').layers, n, seed, like)
    old = net(6)
    randomise(old)
    new = net(7, like=old, seed=1)
    assert new.fresh==['2'] and net(6, like=old).fresh==[] and net(6, n=4, like=old).fresh==old.fresh==['0','1','2']
    for l,q,fresh in zip(new.layers, old.layers, (False,False,True)):
        assert all(torch.equal(l.U[k], q.U[k]) and torch.equal(l.V[k], q.V[k]) for k in l.U) != fresh
        assert not fresh or l.V['weight'].abs().max()==0

def test_phi_begin_as_if_the_layer_were_made_anew():
    "Not from what it has learned: φ_U is drawn as torch draws a new layer's weights, φ_V is 0"
    make = lambda: (torch.manual_seed(0), nn.Conv2d(3,4,3))[1]
    learned = make()
    for p in learned.parameters(): nn.init.constant_(p, 7.)
    new,layer = make(),(torch.manual_seed(0), HyperLayer(learned, 5))[1]
    assert all(torch.equal(layer.U[k], getattr(new,k)) and not layer.V[k].any() and (getattr(learned,k)==7).all() for k in ('weight','bias'))

def test_phi_require_gradients_unless_they_follow():
    conv = nn.Conv2d(3,4,3)
    conv.bias.requires_grad_(False)
    grads = lambda **kw: [p.requires_grad for p,_ in HyperNet([('conv',conv)], 5, **kw).params]
    assert grads()==[True]*4 and grads(follow=True)==[True,True,False,False]

def test_a_copy_that_is_made_within_a_batch_is_not_of_that_batch(attach):
    model = tiny(); x = torch.rand(4,3,8,8).double(); model(x)
    net = HyperNet(select(model, (x,), 'first_conv').layers, 6)
    attach(net)
    with torch.no_grad():
        for v in net.layers[0].V.values(): v.normal_()
    with at(net, torch.randn(4,6).double()): twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(x[:3]), model.eval()(x[:3]))

def test_modules_hear_that_evaluation_is_over():
    "Some keep something for eval mode, and let it go when they train"
    class Keeps(nn.Module):
        kept = None
        def train(self, mode=True):
            if mode: self.kept = None
            return super().train(mode)
    model = nn.Sequential(Keeps(), nn.BatchNorm2d(2), nn.Sequential(Keeps()))
    model[1].eval()
    with evaluating(model): model[0].kept = model[2][0].kept = 1
    assert model[0].kept is None and model[2][0].kept is None and [m.training for m in model.modules()]==[True,True,False,True,True]
    model.eval()
    with evaluating(model): model[0].kept = 1
    assert model[0].kept==1 and not any(m.training for m in model.modules())

def test_a_single_module_is_a_strategy():
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16,2))
    assert [l for _,l in select(model, (torch.rand(2,3,4,4),), model[1]).layers]==[model[1]]

class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem,self.head = nn.Conv2d(3, 8, 4, 4),nn.Linear(8, 2)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=True), 1, enable_nested_tensor=False)
    def forward(self, x): return self.head(self.encoder(self.stem(x).flatten(2).transpose(1, 2)).mean(1))

def test_layers_of_a_transformer_of_torch_respond_without_a_gradient():
    "Its fast path would read their weights instead of calling them"
    torch.manual_seed(0)
    model,x = Tokens(),torch.rand(4,3,8,8)
    net = HyperNet(select(model, (x,), 'first_norm').layers, 2)
    with torch.no_grad():
        for v in net.layers[0].V.values(): v.normal_()
    before = torch.backends.mha.get_fastpath_enabled()
    with net.attached(torch.zeros(2)):
        for p in model.parameters(): p.requires_grad_(False)
        losses = net.losses_at(model, lambda: model(x).square().mean(), [torch.tensor([a,0.]) for a in (0.,1.,2.)])
    assert losses.unique().numel()==3 and torch.backends.mha.get_fastpath_enabled()==before==True
