"How much augmentation a training calls for: what is compared, what acts, and in which flows"
import pytest, torch
from torch import nn
from fastai.callback.core import Callback
from fastai.callback.training import GradientAccumulation
from fastai.losses import BCEWithLogitsLossFlat,LabelSmoothingCrossEntropy
from conftest import small_learner,small_net
from hba_fastai.all import HBACallback,LabelSmoothing,PBAPolicy,Policy,Space
from hba_fastai.data import digits_dls
from hba_fastai.ops import OP_NAMES
from hba_fastai.sparing import LEAST,Sparing,compared,shares,untouched
from test_flows import CPUAMP

class Brighter(Policy):
    "A policy whose only hyperparameter is no probability"
    space,checked = Space(gain=(0,0.2)),True
    def draw(self, v, generator): return v.gain
    def dose(self, drawn): return drawn[:,None]
    def apply(self, x, drawn, generator): return x+drawn[:,None,None,None]

def by_heart(): return nn.Sequential(*small_net()[:-3], nn.Flatten(), nn.Linear(16*9, 10)) # a network that can overfit
def probabilities(hba): return hba.schedule.table[:,hba.spare.is_p]

def sparing():
    policies = HBACallback().policies
    return Sparing(policies, policies.start())

def test_it_augments_a_training_that_overfits_and_no_other():
    "40 images, learned by heart, and a learning rate that learns nothing"
    def search(lr, epochs):
        dls = digits_dls(40, 200, bs=20, size=12)
        learn = small_learner(dls=dls, model=by_heart())
        hba = HBACallback(seed=0, sparing=True, hlr=1e-9)
        learn.fit(epochs, lr, cbs=hba)
        return hba
    much,none = search(1e-2, 40),search(1e-9, 10)
    assert much.spare.gap>0.75 and shares(none.spare.gap)[0]==LEAST
    start = much.policies.space.values(much.start)[much.spare.is_p].double()
    for hba in (much,none): assert torch.allclose(probabilities(hba)[-1], start*shares(hba.spare.gap)[0], rtol=1e-4)

@pytest.mark.parametrize('gap', [0.,0.1,0.4,0.8])
def test_of_what_the_search_adds_more_acts(gap):
    class Move(Callback):
        "λ of one copy up, of the other down"
        def after_train(self): self.hba.lam.value = self.hba.start + torch.tensor([1.]*15+[-1.]*15+[0.]*(len(self.hba.start)-30))
    class Fixed(HBACallback):
        name = 'hba'
        def after_train(self):
            super().after_train()
            self.spare.gap = torch.tensor(gap)
    learn,hba = small_learner(),Fixed(seed=0, sparing=True, hlr=1e-9)
    learn.fit(2, cbs=[hba,Move()])
    values = lambda lam: hba.policies.space.values(lam)[hba.spare.is_p].double()
    p0,p = values(hba.start),values(hba.lam.value)
    first,more = max(2*gap-1, 0.05),min(3*gap, 1)
    assert (p[:15]>p0[:15]).all() and (p[15:]<p0[15:]).all()
    acted = torch.where(p>p0, first*p0+more*(p-p0), first*p)
    assert torch.allclose(probabilities(hba)[-1], acted, rtol=1e-4)
    shown,df = learn.recorder.values[-1][learn.recorder.metric_names[1:].index('mean_p')],hba.report()
    assert shown==pytest.approx(acted.mean().item(), rel=1e-4) and df.p_0[OP_NAMES[0]]==pytest.approx(acted[0].item(), rel=1e-4)

def test_without_it_all_probabilities_are_those_of_lambda():
    "And nothing is compared"
    learn,hba = small_learner(),HBACallback(seed=0)
    learn.fit(2, cbs=hba)
    assert hba.spare.n==0 and torch.allclose(probabilities(hba)[-1], hba.policies.space.values(hba.lam.value)[hba.spare.is_p].double())

def test_images_that_nothing_was_done_to_are_compared_in_eval_mode():
    seen = []
    class Spy(HBACallback):
        name = 'hba'
        def attach(self):
            super().attach()
            learn = self.spare.learn
            self.spare.learn = lambda losses: (seen.append(losses), learn(losses))
    class Plain(Callback):
        "Without operations, in front of the search, the same images have this loss"
        order,losses = 14,[]
        def before_batch(self):
            if not self.training or self.hba.clock.count: return
            i = untouched(self.hba).nonzero()[:4,0]
            assert len(i) and (self.hba.tfms[0].drawn.op[i]<0).all()
            self.model.eval()
            with torch.no_grad(): self.losses.append(nn.functional.cross_entropy(self.model(self.xb[0][i]), self.yb[0][i]).item())
            self.model.train()
    model = nn.Sequential(*small_net()[:-1], nn.Dropout(0.9), nn.Linear(16, 10))
    small_learner(model=model).fit(2, cbs=[Spy(seed=0, sparing=True, T_train=3),Plain()])
    assert len(seen)==7 and torch.allclose(torch.stack(seen)[:,0], torch.tensor(Plain.losses), rtol=1e-4) # 20 steps, every third

def test_a_smoothed_loss_has_no_floor():
    "Label smoothing of 0.3 leaves a perfect network a loss above 0.9, and images of the hyper-steps one that is less than twice that"
    gap = {}
    for loss in (None,LabelSmoothingCrossEntropy(0.3)):
        learn,hba = small_learner(n_train=60, loss_func=loss),HBACallback(seed=0, sparing=True, hlr=1e-9)
        learn.fit(40, 1e-2, cbs=hba)
        gap[loss] = hba.spare.gap.item()
    assert min(gap.values())>0.55

class Watch(Callback):
    order = 16
    def after_batch(self):
        if self.training: assert self.hba.net.ref.allclose(self.hba.z(self.hba.lam.value).detach(), atol=1e-5)

@pytest.mark.filterwarnings('ignore:.*CUDA is not available')
@pytest.mark.parametrize('fit', ['fine_tune','fit_one_cycle','target','bf16','sum','best','accumulate'])
def test_every_flow(fit):
    from fastai.callback.training import GradientAccumulation
    dls = digits_dls(200, 60, bs=20, size=12)
    kw = {'target': dict(target=dls.valid), 'sum': dict(policy=PBAPolicy()+Brighter()), 'best': dict(exploit='best')}.get(fit, {})
    learn,hba = small_learner(dls=dls),HBACallback(seed=0, sparing=True, **kw)
    keys = list(learn.model.state_dict())
    if fit=='bf16': learn.to_bf16()
    cbs = [hba,Watch(),*([GradientAccumulation(40)] if fit=='accumulate' else [])]
    if fit=='fine_tune': learn.fine_tune(3, 1e-2, cbs=cbs)
    else: learn.fit_one_cycle(4, 1e-2, cbs=cbs)
    assert hba.spare.n>=5 and hba.spare.losses.isfinite().all() and 0<=hba.spare.gap<=1 and hba.spare.kept is None
    assert list(learn.model.state_dict())==keys and 'gap' not in learn.metrics.attrgot('name')
    assert 'gap' in learn.recorder.metric_names and len(hba.spare.noted)==len(hba.points)

def test_with_a_target_the_gap_is_kept_once_its_images_join_training():
    dls,gaps = digits_dls(40, 200, bs=20, size=12),[]
    class Look(Callback):
        def after_batch(self):
            if self.training: gaps.append((self.hba.is_late(),self.hba.spare.gap.item()))
    small_learner(dls=dls, model=by_heart()).fit(40, 1e-2, cbs=[HBACallback(seed=0, sparing=True, target=dls.valid),Look()])
    assert len({g for late,g in gaps if late})==1 and len({g for late,g in gaps if not late})>1

@pytest.mark.parametrize('kw,error,match', [
    (dict(condition='lambda'), ValueError, "condition='lambda' does not say"), (dict(policy=LabelSmoothing()), ValueError, 'LabelSmoothing has none'),
    (dict(sparing=1), TypeError, 'sparing=1 is a int')])
def test_what_it_cannot_do_is_refused(kw, error, match):
    with pytest.raises(error, match=match): HBACallback(**{'sparing': True, **kw})

def test_losses_that_are_not_finite_change_nothing():
    spare = sparing()
    spare.learn(torch.tensor([float('nan'),1.]))
    assert spare.gap==0
    for own in (0.1,float('inf'),0.1): spare.learn(torch.tensor([own,1.]))
    assert torch.isclose(spare.gap, torch.tensor(0.9))

@pytest.mark.parametrize('loss', [-1.,float('nan')])
def test_what_cannot_be_compared_is_said(loss):
    spare = sparing()
    spare.note(0.)
    spare.learn(torch.tensor([loss,1.]))
    with pytest.warns(UserWarning, match='could not yet, so 5% of the start policy acts'): spare.note(1.)
    assert spare.gap==0

def test_mixed_precision_ends_with_the_batch():
    class See(Callback):
        order,seen = 200,[]
        def after_batch(self): self.seen.append(torch.is_autocast_enabled('cpu'))
    learn = small_learner(cbs=CPUAMP('bf16'))
    learn.fit(1, cbs=[HBACallback(seed=0, sparing=True),See()])
    assert See.seen and not any(See.seen) and not torch.is_autocast_enabled('cpu')

def test_sub_batches_are_not_compared_one_by_one():
    "Ten steps of two batches, a hyper-step every four: three comparisons, at 0, 4 and 8"
    learn,hba = small_learner(),HBACallback(seed=0, sparing=True)
    learn.fit(2, cbs=[hba,GradientAccumulation(40)])
    assert hba.spare.n==3

def test_one_score_for_two_classes():
    pred,targ = torch.randn(6,1),torch.randint(0, 2, (6,))
    loss = BCEWithLogitsLossFlat()
    assert compared(loss, pred, targ)==loss(pred, targ)

def test_the_column_is_that_of_the_search_that_runs():
    "Another model begins another search"
    hba = HBACallback(seed=0, sparing=True)
    small_learner().fit(1, cbs=hba)
    learn = small_learner()
    with pytest.warns(UserWarning, match='another model'): learn.fit(1, cbs=hba)
    assert learn.recorder.values[-1][learn.recorder.metric_names[1:].index('gap')]==hba.spare.gap
