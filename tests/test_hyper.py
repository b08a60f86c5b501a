"Hyper-layers against the naive per-sample network of Eq. 20/24/26, the fold, and the hypergradient against finite differences; all in float64"
import copy
import pytest, torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d,GroupNormAct,LayerNorm2d,RmsNorm,RmsNorm2d,ScaledStdConv2d,ScaledStdConv2dSame
from timm.layers.conv2d_same import Conv2dSame
from torch import nn
from torch.utils.checkpoint import checkpoint
from hba_fastai.hyper import HyperNet,check_hypergradient,evaluating,hypergradient,select
from hba_fastai.pba import PBAPolicy
from hba_fastai.space import PBASpace

LAYERS = {'Conv1d': (lambda: nn.Conv1d(4,6,3,padding=1), (4,9)), 'Conv2d': (lambda: nn.Conv2d(4,6,3,2,1,groups=2), (4,9,7)),
          'Conv2d reflect': (lambda: nn.Conv2d(4,6,3,padding=1,padding_mode='reflect',bias=False), (4,9,7)), 'Conv3d': (lambda: nn.Conv3d(4,6,3), (4,5,5,5)),
          'Linear': (lambda: nn.Linear(4,6), (4,)), 'Linear tokens': (lambda: nn.Linear(4,6,bias=False), (5,4)),
          'BatchNorm1d': (lambda: nn.BatchNorm1d(4), (4,)), 'BatchNorm1d seq': (lambda: nn.BatchNorm1d(4), (4,6)),
          'BatchNorm2d': (lambda: nn.BatchNorm2d(4), (4,6,5)), 'BatchNorm3d': (lambda: nn.BatchNorm3d(4), (4,3,3,3)),
          'GroupNorm': (lambda: nn.GroupNorm(2,4), (4,6,5)), 'InstanceNorm2d': (lambda: nn.InstanceNorm2d(4,affine=True), (4,6,5)),
          'LayerNorm': (lambda: nn.LayerNorm(4), (6,4)), 'LayerNorm no bias': (lambda: nn.LayerNorm(4,bias=False), (6,4)), 'LayerNorm 2 dims': (lambda: nn.LayerNorm((6,4)), (3,6,4)),
          'RMSNorm': (lambda: nn.RMSNorm(4), (6,4)), 'timm RmsNorm': (lambda: RmsNorm(4), (6,4)), 'timm RmsNorm2d': (lambda: RmsNorm2d(4), (4,6,5)),
          'timm LayerNorm2d': (lambda: LayerNorm2d(4), (4,6,5)), 'timm GroupNormAct': (lambda: GroupNormAct(4,2), (4,6,5)), 'timm BatchNormAct2d': (lambda: BatchNormAct2d(4), (4,6,5)),
          'timm Conv2dSame': (lambda: Conv2dSame(4,6,3,2), (4,9,7)), 'timm ScaledStdConv2d': (lambda: ScaledStdConv2d(4,6,3), (4,9,7)),
          'timm ScaledStdConv2dSame': (lambda: ScaledStdConv2dSame(4,6,3,2), (4,9,7))}

def make(name, n=7, b=5, mode=True):
    "A layer with random affine part, its hyper-layer with random φ, inputs and deviations"
    torch.manual_seed(0)
    layer = LAYERS[name][0]().double().train(mode)
    for p in layer.parameters(): nn.init.normal_(p)
    x,z = torch.randn(b,*LAYERS[name][1]).double(),torch.randn(b,n).double()
    plain = copy.deepcopy(layer)
    net = HyperNet([('layer',layer)], n)
    net.attach()
    return layer,plain,net,x,z

def attached(layers, n):
    net = HyperNet(layers, n)
    net.attach()
    return net

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
def test_batched_equals_naive_per_sample(name, mode):
    layer,plain,net,x,z = make(name, mode=mode)
    randomise(net)
    with net.at(z): got = layer(x)
    if isinstance(plain, nn.modules.batchnorm._BatchNorm) and mode: # statistics are the batch's: run it whole with each sample's weights
        rows = [torch.func.functional_call(copy.deepcopy(plain), weights(plain,net,z[i]), x)[i] for i in range(len(x))]
    else: rows = [torch.func.functional_call(plain, weights(plain,net,z[i]), x[i:i+1])[0] for i in range(len(x))]
    assert (got-torch.stack(rows)).abs().max() < 1e-10

@pytest.mark.parametrize('name', LAYERS)
def test_attach_changes_nothing_and_detach_gives_the_plain_layer_back(name):
    layer,plain,net,x,z = make(name)
    with net.at(z): y = layer(x)
    assert (y-plain(x)).abs().max() < 1e-12 # φ_V = 0; norm layers are computed in another order
    assert torch.equal(layer(x), copy.deepcopy(plain)(x)) or isinstance(plain, nn.modules.batchnorm._BatchNorm)
    assert list(layer.state_dict())==list(plain.state_dict())
    net.detach()
    assert 'forward' not in vars(layer) and type(layer) is type(plain) and vars(layer).keys()==vars(plain).keys()

@pytest.mark.parametrize('name', LAYERS)
def test_fold_moves_to_the_uncentred_network(name):
    "λ → λ+Δ: the plain layer becomes θ̂(λ+Δ) of the un-centred form with φ0 = weight - diag(φ_V λ) φ_U"
    layer,plain,net,x,z = make(name)
    randomise(net)
    lam,delta = z[0],z[1]
    phi0 = {k: w for k,w in weights(plain, net, -lam).items()}
    net.fold(delta)
    holder = copy.deepcopy(plain)
    for k,w in phi0.items(): getattr(holder,k).data.copy_(w)
    for k,w in weights(holder, net, lam+delta).items(): assert (getattr(layer,k)-w).abs().max() < 1e-10

@pytest.mark.parametrize('name', ['Conv2d','Linear','BatchNorm2d','LayerNorm'])
def test_gradients_of_phi_are_those_of_the_naive_network(name):
    layer,plain,net,x,z = make(name, mode=False)
    randomise(net)
    t = torch.randn_like(plain(x))
    ps = [p for p,_ in net.params]
    with net.at(z): got = torch.autograd.grad((layer(x)*t).sum(), ps)
    rows = torch.stack([torch.func.functional_call(plain, weights(plain,net,z[i]), x[i:i+1])[0] for i in range(len(x))])
    for g,w in zip(got, torch.autograd.grad((rows*t).sum(), ps)): assert (g-w).abs().max() < 1e-9

def tiny():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4,5,3), nn.GroupNorm(1,5), nn.Tanh(), nn.Flatten(1), nn.Dropout(0.5), nn.LazyLinear(3)).double()

@pytest.mark.parametrize('strategy', ['first_bn','conv+bn','all'])
@pytest.mark.parametrize('condition', ['lambda','dose'])
def test_hypergradient_equals_finite_differences(condition, strategy, h=1e-4):
    model,x,y,policy = tiny(),torch.rand(9,3,8,8).double(),torch.randint(0,3,(9,)),PBAPolicy()
    model(x); model[1].running_mean.normal_(); model[1].running_var.uniform_(0.5,2)
    lam = PBASpace().start(0.05).double() + 0.5*torch.randn(54).double()
    z = (lambda l: l) if condition=='lambda' else policy.expected
    net = attached(select(model, (x,), strategy).layers, len(z(lam)))
    randomise(net)
    before = copy.deepcopy(model.state_dict())
    loss = lambda: F.cross_entropy(model(x), y)
    l,g = hypergradient(net, model, loss, lam, z)
    def at(lam2):
        with evaluating(model),torch.no_grad(),net.at((z(lam2)-z(lam))[None]): return loss()
    fd = torch.stack([(at(lam+e)-at(lam-e))/(2*h) for e in h*torch.eye(54).double()])
    assert (g-fd).abs().max() < 1e-5*g.abs().max() + 1e-8 # O(h²) of the difference, and rounding over 2h
    assert g.abs().min() > 0 and l==at(lam)
    after = model.state_dict()
    assert all(torch.equal(before[k], after[k]) for k in before) and all(p.grad is None for p in model.parameters()) and model.training
    assert torch.allclose(hypergradient(net, model, loss, lam, z, scale=1024.)[1], g, rtol=1e-12)

def test_uncentred_hypergradient_is_the_same():
    model,x,y = tiny(),torch.rand(9,3,8,8).double(),torch.randint(0,3,(9,))
    model(x)
    net,lam = attached(select(model, (x,), 'bn').layers, 54),torch.randn(54).double()
    randomise(net)
    loss = lambda: F.cross_entropy(model(x), y)
    l,g = hypergradient(net, model, loss, lam, lambda l: l)
    net.fold(-lam) # now the layers hold φ0
    l2,g2 = hypergradient(net, model, loss, lam, lambda l: l, ref=torch.zeros(54))
    assert torch.allclose(l, l2, rtol=1e-10) and torch.allclose(g, g2, rtol=1e-8)

def test_first_is_the_first_that_runs():
    class M(nn.Module):
        def __init__(self): super().__init__(); self.late,self.early = nn.BatchNorm2d(3),nn.BatchNorm2d(3)
        def forward(self, x): return self.late(self.early(x))
    assert [n for n,_ in select(M(), (torch.rand(2,3,4,4),), 'first_bn').layers]==['early']

def test_batch_dimension_that_changes_is_refused():
    class Fold(nn.Module):
        def forward(self, x): return x.view(-1, 1, *x.shape[2:])
    model = nn.Sequential(nn.BatchNorm2d(3), Fold(), nn.BatchNorm2d(1))
    assert len(select(model, (torch.rand(2,3,4,4),), 'first_bn').layers)==1
    with pytest.raises(ValueError, match='`2` sees a batch of 6 where the model got 2'): select(model, (torch.rand(2,3,4,4),), 'bn')
    net = attached([('2', model[2])], 4)
    with net.at(torch.zeros(2,4)), pytest.raises(ValueError, match='got a batch of 6 and the augmentation was drawn for 2'): model(torch.rand(2,3,4,4))

def test_deepcopy_of_an_attached_model_is_its_own():
    "As averaging callbacks do: the copy must not run through the original's weights"
    model = tiny(); x = torch.rand(4,3,8,8).double(); model(x)
    net = attached(select(model, (x,), 'first_conv').layers, 6)
    twin = copy.deepcopy(model)
    with torch.no_grad(): twin[0].weight.zero_(); twin[0].bias.zero_()
    assert twin[0](x).abs().max()==0 and model[0](x).abs().max()>0

@pytest.mark.parametrize('strategy,match', [('first_bn','matches no layer of Sequential, whose layers are: 1 Conv2d, 1 Linear'), ('frist_bn','unknown'),
                                            ([nn.Linear(2,2)],'matches no layer'), (lambda m: False,'matches no layer')])
def test_strategies_that_do_not_fit(strategy, match):
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.Flatten(), nn.Linear(16,2))
    with pytest.raises(ValueError, match=match): select(model, (torch.rand(2,3,4,4),), strategy)

@pytest.mark.parametrize('training', [True,False])
def test_a_frozen_batch_norm_responds_too(training):
    "As with `train_bn=False` and BnFreeze: the layer is in eval mode and its weights are frozen, in a model that trains"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*36,2)).double().train(training)
    model[1].eval().requires_grad_(False)
    x,z = torch.rand(5,3,8,8).double(),torch.randn(5,3).double()
    stats = copy.deepcopy(model[1].state_dict())
    with HyperNet(select(model, (x,)).layers, 3) as net:
        for p,_ in net.params: nn.init.normal_(p)
        with net.at(z): moved = model(x)
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
        self.blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(4,4,3,padding=1), nn.GroupNorm(1,4), nn.Tanh()) for _ in range(3))
        self.head = nn.Linear(4,3)
    def forward(self, x):
        x = self.stem(x)
        for b in self.blocks: x = b(x) if self.how is None else checkpoint(b, x, **self.how)
        return self.head(x.mean((2,3)))

HOW = {'not reentrant': dict(use_reentrant=False), 'reentrant': dict(use_reentrant=True)}

def checkpointed(how, strategy='norm'):
    model,x,y = Checkpointed(how).double(),torch.rand(6,3,8,8, generator=torch.Generator().manual_seed(0)).double(),torch.arange(6)%3
    net = attached(select(model, (x,), strategy).layers, 5)
    torch.manual_seed(3)
    randomise(net)
    return model,net,x,lambda: F.cross_entropy(model(x), y)

@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad') # torch says so in the forward pass without gradients that `select` makes
@pytest.mark.parametrize('how', HOW.values(), ids=HOW)
def test_checkpointing_leaves_the_gradients_of_phi_as_they_are(how):
    grads = []
    for h in (None,how):
        _,net,_,loss = checkpointed(h)
        net.set(torch.randn(6,5, generator=torch.Generator().manual_seed(4)).double())
        loss().backward()
        net.set(None)
        grads.append([p.grad for p,_ in net.params])
    assert all(g.abs().max()>0 and torch.allclose(g, w, rtol=1e-12, atol=1e-14) for g,w in zip(*grads))

def test_hypergradient_through_checkpointed_blocks():
    lam = torch.randn(5).double()
    (l,g),(l2,g2) = (hypergradient(net, model, loss, lam, lambda l: l) for model,net,_,loss in (checkpointed(None),checkpointed(HOW['not reentrant'])))
    assert g.abs().min()>0 and torch.equal(l, l2) and torch.allclose(g, g2, rtol=1e-12)

def everything(model): return [t.clone() for t in model.state_dict().values()]+[torch.get_rng_state()],[m.training for m in model.modules()],[p.grad for p in model.parameters()]

@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
@pytest.mark.parametrize('how,match', [(None,None), (HOW['not reentrant'],None), (HOW['reentrant'],'use_reentrant=False')])
@pytest.mark.parametrize('strategy', ['norm','first_conv'])
def test_a_trial_refuses_what_has_no_hypergradient_and_leaves_everything_as_it_is(how, match, strategy):
    model,net,_,loss = checkpointed(how, strategy)
    model.head = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(0.5), model.head).double()
    noisy,before = lambda: loss()*torch.rand(()),everything(model)
    if match:
        with pytest.raises(ValueError, match=match): check_hypergradient(net, model, noisy)
    else: check_hypergradient(net, model, noisy)
    after = everything(model)
    assert all(torch.equal(a, b) for a,b in zip(before[0], after[0])) and before[1:]==after[1:] and all(l.z is None for l in net.layers)

@pytest.mark.filterwarnings('ignore:None of the inputs have requires_grad')
def test_a_trial_sees_a_layer_that_the_gradient_misses():
    "The only checkpointed block gets no input that requires gradients, so torch gives its parameters none, and says nothing"
    class First(nn.Module):
        def __init__(self): super().__init__(); self.body,self.rest = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4)),nn.Sequential(nn.Conv2d(4,4,3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4*16,2))
        def forward(self, x): return self.rest(checkpoint(self.body, x, use_reentrant=True))
    model,x = First(),torch.rand(3,3,8,8)
    loss = lambda: model(x).square().mean()
    with HyperNet(select(model, (x,), 'bn').layers, 5) as net, pytest.raises(ValueError, match='reaches the hyper-layer `body.1`'): check_hypergradient(net, model, loss)
    with HyperNet([('rest.1',model.rest[1])], 5) as net: check_hypergradient(net, model, loss)

# --- life of a HyperNet

def test_constructors_change_nothing_and_failures_undo_themselves():
    model = tiny(); x = torch.rand(4,3,8,8).double(); model(x)
    rng,names = torch.get_rng_state(),[sorted(vars(m)) for m in model.modules()]
    net = HyperNet(select(model, (x,), 'all').layers, 6)
    same = lambda: names==[sorted(vars(m)) for m in model.modules()] and torch.equal(rng, torch.get_rng_state())
    assert same()
    with HyperNet(select(model, (x,), [model[1]]).layers, 6):
        with pytest.raises(ValueError, match='`1` responds to a search already'): net.attach()
        assert 'forward' not in vars(model[0]) and 'forward' in vars(model[1])
    assert same()
    with pytest.raises(KeyError), net: raise KeyError
    net.detach()
    assert same()

def test_a_forward_of_the_user_is_put_back():
    bn = nn.BatchNorm2d(3)
    mine = lambda x: 2*nn.BatchNorm2d.forward(bn, x)
    bn.forward = mine
    x = torch.rand(4,3,5,5)
    with HyperNet([('bn',bn)], 2): assert bn.forward is not mine and torch.equal(bn(x), mine(x))
    assert bn.forward is mine

def test_phi_go_on_where_shapes_agree_and_begin_anew_elsewhere():
    net = lambda width,n=5,like=None,seed=0: HyperNet(select(nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Conv2d(4,width,3)), (torch.rand(2,3,8,8),), 'all').layers, n, seed, like)
    old = net(6)
    randomise(old)
    new = net(7, like=old, seed=1)
    assert new.fresh==['2'] and net(6, like=old).fresh==[] and net(6, n=4, like=old).fresh==old.fresh==['0','1','2']
    for l,q,fresh in zip(new.layers, old.layers, (False,False,True)):
        assert all(torch.equal(l.U[k], q.U[k]) and torch.equal(l.V[k], q.V[k]) for k in l.U) != fresh and (not fresh or l.V['weight'].abs().max()==0)

def test_phi_require_gradients_unless_they_follow():
    conv = nn.Conv2d(3,4,3)
    conv.bias.requires_grad_(False)
    grads = lambda **kw: [p.requires_grad for p,_ in HyperNet([('conv',conv)], 5, **kw).params]
    assert grads()==[True]*4 and grads(follow=True)==[True,True,False,False]
