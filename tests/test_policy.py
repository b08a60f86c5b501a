"The sampler against its specification and against a literal walk, and the expected dose against simulation"
import numpy as np, pytest, torch
from hba_fastai.ops import OP_NAMES
from hba_fastai.policy import GRADED,P_K,PBAPolicy
from hba_fastai.space import Space

def gen(seed): return torch.Generator().manual_seed(seed)

def test_shares_at_five_percent(n=100_000):
    d = PBAPolicy().draw(Space().start().expand(n,-1), gen(0))
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
    f = policy.features(policy.draw(lam.float().expand(200_000,-1), gen(2)))
    want = policy.expected(lam).float()
    assert ((f.mean(0)-want).abs() < 5*f.std(0)/200_000**0.5 + 1e-6).all()

def test_dose_gradient_is_that_of_finite_differences():
    policy,lam = PBAPolicy(),torch.randn(54, generator=gen(1)).double()
    assert torch.autograd.gradcheck(policy.expected, lam.requires_grad_())

def test_draws_do_not_depend_on_neighbours(n=512):
    "Other λ for the others, or fewer of them: the same draw for sample 0"
    policy = PBAPolicy()
    a = policy.draw(torch.zeros(n,54), gen(3))
    other = torch.randn(n,54)*3; other[:7] = 0
    for b,k in ((policy.draw(other, gen(3)),7), (policy.draw(torch.zeros(9,54), gen(3)),9)):
        for u,v in zip(a,b): assert torch.equal(u[:k], v[:k])
    x = torch.rand(n,3,8,8)
    assert torch.equal(policy.apply(x, a)[:7], policy.apply(x[:7], type(a)(*[o[:7] for o in a])))

def test_signs_are_even_and_only_geometric(n=50_000):
    d = PBAPolicy().draw(torch.zeros(n,54), gen(0))
    geo,on = d.op<5,d.op>=0
    assert (d.m[on&~geo]>=0).all()
    share = (d.m[geo&on]<0).float().mean()
    assert abs(share-0.5) < 4*0.5/(geo&on).sum()**0.5
    assert (d.centre>=0).all() and (d.centre<1).all()

def test_severity_grows_from_nothing_to_all():
    policy,n = PBAPolicy(),Space().n
    lo,hi = (policy.severities(policy.space.values(torch.full((54,), v).double())) for v in (-40.,40.))
    for e,(o,_) in enumerate(policy.space.entries):
        want = (0,0) if o not in GRADED else (-1,1) if o in ('Contrast','Color','Brightness','Sharpness') else (0,1)
        assert (round(lo[e].item(),6),round(hi[e].item(),6))==want

@pytest.mark.parametrize('c', [1,2,4,13])
def test_color_is_left_out_with_one_warning(c):
    with pytest.warns(UserWarning, match='Color needs RGB') as w: y = PBAPolicy()(torch.rand(64,c,8,8), torch.full((64,54), 3.), gen(0))
    assert len(w)==1 and y.shape==(64,c,8,8)
    assert not (PBAPolicy(skip=['Color']).draw(torch.full((999,54), 3.), gen(0)).op==OP_NAMES.index('Color')).any()

def test_untouched_images_are_bit_equal():
    x = torch.rand(500,3,8,8)
    policy = PBAPolicy()
    d = policy.draw(Space().start().expand(500,-1), gen(0))
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
            d = policy.draw(lam.detach().repeat(8,1)[:8])
            for v in (x,x.to(torch.uint8)): assert policy.apply(v, d).shape==x.shape
            policy.features(d)
            policy.expected(lam[0]).sum().backward()
