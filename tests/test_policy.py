"The sampler against its specification and against a literal walk, and the expected dose against simulation"
import random
import numpy as np, pytest, torch
from torch import nn
from hba_fastai.dropout import Dropout
from hba_fastai.ops import OP_NAMES
from hba_fastai.pba import GRADED,P_K,PBAPolicy
from hba_fastai.policy import Data,Policy,check_policy
from hba_fastai.smoothing import LabelSmoothing
from hba_fastai.space import PBASpace,Space

def gen(seed): return torch.Generator().manual_seed(seed)

def test_shares_at_five_percent(n=100_000):
    d = PBAPolicy().draw_under(PBASpace().start(0.05).expand(n,-1), gen(0))
    count = (d.op>=0).sum(1)
    for k,share in enumerate((0.37,0.41,0.22)):
        assert abs((count==k).float().mean()-share) < 0.005 + 4*(share*(1-share)/n)**0.5 # shares are given to two digits; four standard errors

def literal_walk(p, rng):
    "PBA's Algorithm 1, one image: which entries are applied"
    k,done = rng.choice(3, p=P_K),[]
    for e in rng.permutation(len(p)):
        if len(done)==k: break
        if rng.random()<p[e]: done.append(e)
    return done

def test_dose_equals_a_literal_walk(n=40_000):
    "P(entry applied) in closed form, by our sampler, and by the algorithm as PBA writes it, for widely different probabilities"
    policy,lam = PBAPolicy(),torch.randn(54, generator=gen(1)).double()*1.5
    p,rng,count = policy.space.values(lam)[:30].numpy(),np.random.default_rng(0),np.zeros(30)
    for _ in range(n): count[literal_walk(p, rng)] += 1
    exact = policy.p_applied(lam).numpy()
    se = (exact*(1-exact)/n)**0.5
    assert (abs(count/n-exact) < 5*se+1e-9).all()
    f = policy.dose(policy.draw_under(lam.float().expand(200_000,-1), gen(2)))
    want = policy.expected(lam).float()
    assert ((f.mean(0)-want).abs() < 5*f.std(0)/200_000**0.5 + 1e-6).all()

@pytest.mark.parametrize('sigma', [0.,0.5,1.,2.])
def test_dose_gradient_is_that_of_finite_differences(sigma):
    policy,lam = PBAPolicy(),torch.randn(54, generator=gen(1)).double()
    assert torch.autograd.gradcheck(lambda l: policy.expected(l, sigma), lam.requires_grad_())

@pytest.mark.parametrize('sigma', [0.5,1.,2.])
def test_mean_of_values_is_exact(sigma):
    "Against Gauss-Hermite with 150 nodes, wrong by about exp(-2·π/(σ√2)·√300) < 1e-16; the bound of ours is 2e-12 of the range"
    n,w = (torch.from_numpy(o) for o in np.polynomial.hermite_e.hermegauss(150))
    space,lam = PBASpace(),torch.linspace(-15, 15, 301).double()[:,None].expand(-1,54)
    want = (space.values(lam[...,None,:]+sigma*n[:,None])*(w/w.sum())[:,None]).sum(-2)
    assert ((space.expected(lam, sigma)-want).abs() <= 2e-12*(space.hi-space.lo)).all()
    assert (space.expected(lam.float(), sigma)-want).abs().div(space.hi-space.lo).max() < 1e-6 # float32, whose steps are 1.2e-7

@pytest.mark.parametrize('sigma', [0.5,1.,2.])
@pytest.mark.parametrize('p_rotate,skip', [(0.05,[]), (0.9,[]), (0.9,['Invert','TranslateX','Cutout'])])
def test_mean_dose_under_perturbed_hyperparameters(p_rotate, skip, sigma, n=100_000):
    "Five standard errors hold the new expectation of every feature; the one at the bare λ, by which images under λ+ε were centred before, is far outside"
    policy,lam = PBAPolicy(skip=skip),PBASpace().start(0.05)
    lam[[policy.space.names.index(f'Rotate_{c}.p') for c in (0,1)]] = torch.tensor(p_rotate).logit()
    lam_i = lam + sigma*policy.active*torch.randn(n, 54, generator=gen(4))
    f = policy.dose(policy.draw_under(lam_i, gen(5))).double()
    off = lambda *args: (f.mean(0)-policy.expected(lam.double(), *args)).abs() / (f.std(0)/n**0.5+1e-9)
    assert (off(sigma) < 5).all() and off().max() > 9
    assert (f[:,[OP_NAMES.index(o) for o in skip]]==0).all()

def test_draws_do_not_depend_on_neighbours(n=512):
    "Other λ for the others, or fewer of them: the same draw for sample 0"
    policy = PBAPolicy()
    a = policy.draw_under(torch.zeros(n,54), gen(3))
    other = torch.randn(n,54)*3; other[:7] = 0
    for b,k in ((policy.draw_under(other, gen(3)),7), (policy.draw_under(torch.zeros(9,54), gen(3)),9)):
        for u,v in zip(a,b): assert torch.equal(u[:k], v[:k])
    x = torch.rand(n,3,8,8)
    assert torch.equal(policy.apply(x, a)[:7], policy.apply(x[:7], type(a)(*[o[:7] for o in a])))

@pytest.mark.parametrize('shift', [1,-1,2])
def test_who_looks_at_one_neighbour_is_refused(shift):
    "Whichever: the last image, which the check exchanges, is the neighbour of one other"
    class Blend(Policy):
        space = Space(blend=(0,0.5))
        def draw(self, v, generator): return v.blend*torch.rand(len(v), generator=generator)
        def dose(self, drawn): return drawn[:,None]
        def apply(self, x, drawn, generator): return x.lerp(x.roll(shift, 0), drawn[:,None,None,None])
    with pytest.raises(ValueError, match='depends on the others in its batch'): check_policy(Blend())

@pytest.mark.parametrize('shift', [1,-1])
def test_so_is_a_loss_that_looks_at_one(shift):
    class Shared(LabelSmoothing):
        def on_loss(self, losses, pred, targ, drawn): return losses.lerp(losses.roll(shift), drawn)
    with pytest.raises(ValueError, match='`on_loss` of Shared'): check_policy(Shared())

def test_a_sum_is_for_the_model_as_soon_as_one_part_is():
    model,both = nn.Sequential(nn.Linear(2,2), nn.Dropout(0.1)),PBAPolicy()+LabelSmoothing()
    assert both.for_model(model) is both and len((both+Dropout()).for_model(model).space)==len(both.space)+1

def test_a_check_draws_nothing_from_the_global_generators():
    before = torch.get_rng_state(),np.random.get_state()[2],random.getstate()
    check_policy(LabelSmoothing())
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[2],random.getstate())==before[1:]

def test_signs_are_even_and_only_geometric(n=50_000):
    d = PBAPolicy().draw_under(torch.zeros(n,54), gen(0))
    geo,on = d.op<5,d.op>=0
    assert (d.m[on&~geo]>=0).all()
    share = (d.m[geo&on]<0).float().mean()
    assert abs(share-0.5) < 4*0.5/(geo&on).sum()**0.5
    assert (d.centre>=0).all() and (d.centre<1).all()

def test_severity_grows_from_nothing_to_all():
    policy,n = PBAPolicy(),PBASpace().n
    lo,hi = (policy.severities(policy.space.values(torch.full((54,), v).double())) for v in (-40.,40.))
    for e,(o,_) in enumerate(policy.space.entries):
        want = (0,0) if o not in GRADED else (-1,1) if o in ('Contrast','Color','Brightness','Sharpness') else (0,1)
        assert (round(lo[e].item(),6),round(hi[e].item(),6))==want

@pytest.mark.parametrize('c', [1,2,4,13])
def test_color_is_left_out_with_one_warning(c):
    with pytest.warns(UserWarning, match='Color needs RGB') as w: y = PBAPolicy()(torch.rand(64,c,8,8), torch.full((64,54), 3.), gen(0))
    assert len(w)==1 and y.shape==(64,c,8,8)
    assert not (PBAPolicy(skip=['Color']).draw_under(torch.full((999,54), 3.), gen(0)).op==OP_NAMES.index('Color')).any()

def test_what_cannot_act_takes_up_no_slot(n=50_000):
    "Invert alone is left, with both gates open: it fills all slots that the cap allows, and nothing else is drawn, whatever λ says"
    policy = PBAPolicy(skip=[o for o in OP_NAMES if o not in ('Invert','Color')])
    with pytest.warns(UserWarning, match='Color needs RGB'): policy = policy.bind(Data(1))
    assert policy.inactive==[o for o in OP_NAMES if o!='Invert'] and [n for n,a in zip(policy.space.names, policy.active) if a]==['Invert_0.p','Invert_1.p']
    d = policy.draw_under(torch.full((n,54), 50.), gen(0))
    assert set(d.op.unique().tolist())=={-1,OP_NAMES.index('Invert')}
    for k,share in enumerate(P_K): assert abs(((d.op>=0).sum(1)==k).float().mean()-share) < 4*(share*(1-share)/n)**0.5
    assert torch.allclose(policy.expected(torch.full((54,), 50.))[:15].sum(), torch.tensor(1.3)) # 0.3 + 2*0.5

def test_limits_bound_what_is_drawn():
    "Severities keep the unit of Table 7: 10 of its 30 degrees are a third"
    policy = PBAPolicy(limits={'Rotate': (0,10), 'Brightness': (0.8,1.2)})
    d = policy.draw_under(torch.full((20_000,54), 10.) + 2*torch.randn(20_000, 54, generator=gen(0)), gen(1))
    rotate,bright = (d.op==OP_NAMES.index(o) for o in ('Rotate','Brightness'))
    assert 9.9<d.m[rotate].max()<=10 and -10<=d.m[rotate].min()<-9.9 and 1.19<d.m[bright].max()<=1.2
    assert torch.isclose(d.severity[rotate].max(), torch.tensor(1/3), atol=1e-3) and torch.isclose(d.severity[bright].max(), torch.tensor(0.2/0.9), atol=1e-3)

def test_other_channels_keep_all_that_was_said():
    policy = PBAPolicy(torch.rand(2), True, 'Invert', {'Rotate': (0,10)})
    with pytest.warns(UserWarning, match='Color needs RGB'): grey = policy.bind(Data(2))
    assert torch.equal(grey.fill, policy.fill) and grey.bilinear and grey.inactive==['Invert','Color'] and grey.space.ranges==policy.space.ranges
    assert policy.inactive==['Invert'] and policy.bind(Data(3)).inactive==['Invert'] and grey.bind(Data(1)).inactive==grey.inactive

def test_skip_is_checked():
    with pytest.raises(ValueError, match='names all 15 operations'): PBAPolicy(skip=OP_NAMES)
    with pytest.raises(ValueError, match="Flip.*which are not among the operations"): PBAPolicy(skip='Flip')
    color = PBAPolicy(skip=[o for o in OP_NAMES if o!='Color'])
    with pytest.raises(ValueError, match='these have 1 channels, but `skip` names all the others'): color.bind(Data(1))

def test_untouched_images_are_bit_equal():
    x = torch.rand(500,3,8,8)
    policy = PBAPolicy()
    d = policy.draw_under(PBASpace().start(0.05).expand(500,-1), gen(0))
    same = (policy.apply(x, d)==x).flatten(1).all(1)
    assert same[d.op[:,0]<0].all() and not same.all()

def test_no_step_waits_for_the_device():
    "On the meta device, which has no data, whatever must know a value fails; and no constant may come from the host"
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    class Alone(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            host = [o for o in tree_leaves((args,kwargs)) if isinstance(o, torch.Tensor) and o.device.type=='cpu']
            assert not host, f'{func} takes a tensor of the host'
            return func(*args, **(kwargs or {}))
    for fill in (0.5,torch.rand(3)):
        policy = PBAPolicy(fill).to('meta')
        lam,x = torch.zeros(8,54, device='meta', requires_grad=True),torch.rand(8,3,16,16, device='meta')
        with Alone():
            d = policy.draw_under(lam.detach().repeat(8,1)[:8])
            for v in (x,x.to(torch.uint8)): assert policy.apply(v, d).shape==x.shape
            policy.dose(d)
            for sigma in (0.,1.): policy.expected(lam[0], sigma).sum().backward()

def test_a_look_at_one_batch_leaves_no_colour_behind():
    "Of the holes: only a policy that is bound to data keeps that of its first batch"
    policy,black = PBAPolicy(),torch.zeros(4,3,16,16)
    def act(p, x): p.apply(x, p.draw_under(torch.full((len(x),54), 3.), gen(0)))
    act(policy, black); act(policy, black[:,:1])
    bound = policy.bind(Data(3, torch.full((3,), 0.5)))
    assert policy.fill is None and bound.fill.tolist()==[0.5]*3
    first = policy.bind(Data(3, None))
    act(first, black); act(first, black+1)
    assert first.fill.tolist()==[0.]*3

@pytest.mark.parametrize('fill', [128,(0.2,0.3,128),-0.1])
def test_a_colour_in_levels_is_refused(fill):
    with pytest.raises(ValueError, match='leaves .0,1.: give its levels divided by 255'): PBAPolicy(fill)

def test_two_inputs_of_other_channels():
    "Depth beside a photograph: holes there have the mean of the colour"
    policy = PBAPolicy(fill=(0.,0.5,1.), skip=[o for o in OP_NAMES if o!='Cutout'])
    d = policy.draw_under(torch.full((40,54), 5.), gen(0))
    grey = policy.apply(torch.zeros(40,1,16,16), d)
    assert grey.unique().tolist()==[0,pytest.approx(0.5, abs=1/255)]
    assert policy.apply(torch.zeros(40,3,16,16), d).amax((0,2,3)).tolist()==pytest.approx([0,0.5,1], abs=1/255)

def test_numbers_of_numpy():
    space = Space(a=(np.float32(0),np.float32(0.5)), b=(np.int64(1),2))
    assert space.of['a'][:2]==(0,0.5) and {type(o) for h in space.of.values() for o in h[:2]}<={int,float}
    limits = PBASpace(limits={'Rotate': (np.int64(0),np.int64(10))}).limits
    assert limits=={'Rotate': (0,10)} and type(limits['Rotate'][1]) is int
    assert Space(x=(0.5,2)).lam(torch.tensor([1])).item()==pytest.approx(np.log(0.5))
    assert torch.equal(space.start(np.float64(0.25)), space.start(0.25)) and torch.equal(space.start({'a': np.float64(0.25)}), space.start({'a': 0.25}))
