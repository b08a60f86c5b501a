"σ that is learned: its gradient, where it settles, what training draws, and that a search that was stopped comes to the same end"
import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from torch import nn
from conftest import small_learner
from hba_fastai.hypernet import HyperNet
from hba_fastai.layers import select
from hba_fastai.search import HBACallback
from hba_fastai.sigma import Spread,by_scale,gradient_by_sample
from hba_fastai.stn import LearnedSigma
from hba_fastai.transform import PolicyTransform

def test_the_gradients_are_those_of_finite_differences():
    "Of the whole loss of a hyper-step, through hyper-layers, at fixed ε, in float64; the third hyperparameter has no effect"
    torch.manual_seed(0)
    model,x = nn.Sequential(nn.Linear(4,5), nn.Tanh(), nn.Linear(5,2)).double(),torch.randn(6,4).double()
    net,lam,s,tau = HyperNet(select(model, (x,), 'linear').layers, 3),torch.randn(3).double(),torch.tensor([-0.5,0.2,0.]).double(),0.3
    for l in net.layers:
        for v in l.V.values(): v.data.normal_()
    active = torch.tensor([True,True,False])
    eps,loss = torch.randn(6,3).double()*active,lambda: model(x).square().mean()
    def value(lam, s):
        sigma = F.softplus(s)
        entropy = torch.distributions.Normal(lam, sigma).entropy()[active].sum()
        return gradient_by_sample(net, model, loss, lam+sigma*eps)[0] - tau*entropy
    with net.attached(torch.zeros(3).double()):
        weights = [p.clone() for p in model.parameters()]
        _,g = gradient_by_sample(net, model, loss, lam+F.softplus(s)*eps)
        h = 1e-6*torch.eye(3).double()
        for found,by in ((g.sum(0), [(value(lam+d, s)-value(lam-d, s))/2e-6 for d in h]),
                         (by_scale((g*eps).sum(0), s, tau, active), [(value(lam, s+d)-value(lam, s-d))/2e-6 for d in h])):
            torch.testing.assert_close(found, torch.stack(by), rtol=1e-6, atol=1e-8) # h² and rounding/h are about 1e-10
        assert by_scale((g*eps).sum(0), s, tau, active)[2]==0
        assert all(torch.equal(p, q) and p.grad is None for p,q in zip(model.parameters(), weights))

@pytest.mark.parametrize('curvature', [0.,1.,10.])
def test_entropy_and_curvature_decide_where_it_settles(curvature):
    "½ k λ_i² has the mean ½ k (λ²+σ²): σ settles at √(τ/k), and grows for ever where there is no curvature"
    lam,tau,one = Spread(torch.zeros(1), 0.5, 1e-2),1e-2,torch.ones(1)
    for i in range(3000): lam.step_both(torch.zeros(1), curvature*lam.sigma, one, 0.1*0.998**i)
    if curvature: assert lam.sigma.item()==pytest.approx((tau/curvature)**0.5, rel=1e-2) and lam.sigma<0.5
    else: assert lam.sigma>1

def search(**kwargs):
    given = dict(strategy='bn', condition='lambda', centred=False, sigma=0.5, T_train=2, warmup=0., hlr=0.05, seed=0, tau=1e-2)
    return LearnedSigma(**{**given, **kwargs})

class Stop(Callback):
    def before_batch(self):
        if self.training and self.learn.epoch==2: raise KeyboardInterrupt

def test_stopped_it_comes_to_the_same_end_and_the_schedule_says_so(tmp_path):
    def fit(*cbs, **kwargs):
        learn = small_learner(path=tmp_path)
        learn.fit(4, 1e-2, cbs=[hba := search(**kwargs), *cbs])
        return hba
    whole = fit()
    with pytest.raises(KeyboardInterrupt): fit(Stop(), checkpoint='s')
    hba = fit(checkpoint='s', resume=True)
    assert torch.equal(whole.lam.s, hba.lam.s) and torch.equal(whole.lam.value, hba.lam.value) and whole.sigmas==hba.sigmas
    assert len(set(hba.sigmas.values()))>30 and hba.schedule.provenance['sigmas']==hba.sigmas and hba.schedule.provenance['tau']==1e-2
    assert hba.schedule.sigma==pytest.approx(sum(hba.sigmas.values())/len(hba.sigmas), rel=1e-6)
    same = {k: getattr(hba, k) for k in ('strategy','condition','centred','sigma','T_train','warmup','hlr','checkpoint','resume')}
    for other in (search(tau=1., checkpoint='s', resume=True), HBACallback(**same)):
        with pytest.raises(ValueError, match='was made with tau=0.01 and this search has (1.0|nothing|None)'):
            small_learner(path=tmp_path).fit(4, 1e-2, cbs=other)

def test_training_draws_with_the_sigma_of_now():
    "Each batch is λ+σε with the σ of the moment, which moves: ε has the deviation 1 (20 of them for each of 60 hyperparameters)"
    seen = []
    class See(Callback):
        order = 40
        def before_batch(self):
            if not self.training: return
            (t,),lam = [t for t in self.dls.train.after_batch.fs if isinstance(t, PolicyTransform)],self.learn.learned_sigma.lam
            eps = ((t.lam_i-lam.value)/lam.sigma)[:,t.active]
            seen.append((lam.sigma.mean().item(),eps.std().item(),eps.numel()))
    small_learner().fit(3, 1e-2, cbs=[search(hlr=0.3, tau=10.), See()])
    assert seen[-1][0]>2*seen[0][0] # the entropy is all that counts
    assert all(abs(sd-1)<5/(2*n)**0.5 for _,sd,n in seen)

@pytest.mark.parametrize('kw,says', [(dict(condition='dose'), "condition='dose'"), (dict(exploit='best'), "exploit='best'"),
    (dict(target='field'), "target='field'"),
    (dict(sigma=0.), 'sigma=0 is where a σ starts'), (dict(tau=-1.), 'tau=-1.0 is the weight'), (dict(tau=float('nan')), 'tau=nan')])
def test_bad_input(kw, says):
    with pytest.raises(ValueError, match=says): search(**kw)

def test_a_derived_callback_keeps_its_class():
    class Ours(LearnedSigma): pass
    class Other(HBACallback): pass
    assert type(Ours.stn(10, learn_sigma=True)) is Ours and type(Other.stn(10)) is Other
    assert type(HBACallback.stn(10, learn_sigma=True)) is LearnedSigma is type(LearnedSigma.stn(10))
    with pytest.raises(TypeError, match='derive Other from LearnedSigma'): Other.stn(10, learn_sigma=True)
