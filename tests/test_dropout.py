"Policies that act in layers and on the loss: what they do to each sample, where they are off, and what is left when a fit ends"
import functools,pickle,sys
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.callback.training import GradientAccumulation
from fastai.data.transforms import Normalize
from fastai.learner import load_learner
from fastai.losses import CrossEntropyLossFlat
from torch import nn
from torch.utils.checkpoint import checkpoint
from conftest import small_learner
from test_undo import Interrupt,assert_plain,fingerprint
import hba_fastai
from hba_fastai.data import digits_dls
from hba_fastai.dropout import Dropout,Rates,dropout_layers,dropped
from hba_fastai.hypernet import HyperNet
from hba_fastai.inside import SampledLoss
from hba_fastai.jitter import ColorJitter,CutoutHoles,InputDropout,InputScale
from hba_fastai.pba import PBAPolicy
from hba_fastai.policy import check_policy
from hba_fastai.replay import PolicyCallback,ScheduleCallback
from hba_fastai.schedule import Schedule,ScheduleError
from hba_fastai.search import HBACallback
from hba_fastai.smoothing import LabelSmoothing
from hba_fastai.space import Space
from hba_fastai.stn import stn_alexnet,stn_policy,stn_space

def gen(seed=0): return torch.Generator().manual_seed(seed)

def net(p=0.3, c=8):
    return nn.Sequential(nn.Conv2d(3,c,3,2,1), nn.BatchNorm2d(c), nn.ReLU(), nn.Dropout2d(p), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(4*c,16), nn.ReLU(), nn.Dropout(p), nn.Linear(16,10))

def learner(p=0.3, c=8, seed=0, **kwargs):
    torch.manual_seed(seed)
    learn = small_learner(seed, model=net(p, c), n_train=100, n_valid=60, **kwargs)
    learn.create_opt()
    return learn

def rows(drawn, i): return type(drawn)(*[t[i] for t in drawn]) if isinstance(drawn, tuple) else drawn[i]

# --- what is done to each sample

LAYERS = {'elements': (nn.Dropout, (4,5)), 'of a vector': (nn.Dropout, (7,)),
          '1d': (nn.Dropout1d, (4,5)), '2d': (nn.Dropout2d, (4,5,6)), '3d': (nn.Dropout3d, (4,5,2,3))}

@pytest.mark.parametrize('what', LAYERS)
def test_a_batch_is_a_loop_of_batches_of_one(what):
    kind,shape = LAYERS[what]
    layer,x = kind(0.2),torch.randn(9, *shape, generator=gen())
    policy = Dropout().for_model(layer)
    drawn = policy.draw_under(2*torch.randn(9, 1, generator=gen(1)), gen(2))
    def out(i):
        with policy.on_layers(layer, lambda: rows(drawn, i)): return layer(x[i])
    batch = out(slice(None))
    assert torch.equal(batch, torch.cat([out(slice(i,i+1)) for i in range(9)]))
    assert torch.equal(batch[[5,2]], out([5,2]))
    kept = batch!=0
    assert kept.any() and not kept.all()
    assert torch.allclose(batch, kept*x/(1-drawn.rate.view(-1, *[1]*len(shape))))
    if kind is not nn.Dropout: assert ((kept==kept.flatten(2).all(2).view(9, 4, *[1]*(len(shape)-1)))).all()

def test_rates_are_met_and_layers_and_samples_are_independent(n=20_000):
    model = nn.ModuleList([nn.Dropout(0.1),nn.Dropout(0.1)])
    policy,x = Dropout().for_model(model),torch.ones(4, n)
    drawn = Rates(torch.tensor([[0.,0.9],[0.05,0.5],[0.5,0.05],[0.89,0.3]]), torch.tensor([0,1,2,2**32-1]))
    with policy.on_layers(model, lambda: drawn): off = torch.stack([m(x)==0 for m in model], 1).float() # (4,2,n)
    p = drawn.rate
    assert ((off.mean(2)-p).abs() <= 5*(p*(1-p)/n)**0.5).all()
    together = off.flatten(0, 1)[1:].corrcoef()-torch.eye(7) # the first drops nothing
    assert together.abs().max() < 5/n**0.5

def test_no_gradient_goes_through_a_mask_to_its_rate():
    rate,x = torch.full((3,), 0.4, requires_grad=True),torch.randn(3, 7, generator=gen(), dtype=torch.float64).requires_grad_()
    seed = torch.arange(3)
    assert not dropped(x.detach(), rate, seed).requires_grad
    assert torch.autograd.gradcheck(lambda x: dropped(x, rate, seed), x)

def test_checkpointed_and_shared_layers_see_one_mask():
    drop = nn.Dropout(0.5)
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.drop,self.again = drop,drop
        def forward(self, x): return self.drop(x),self.again(x)
    model,x = Twice(),torch.randn(6, 50, generator=gen()).requires_grad_()
    policy = Dropout().for_model(model)
    assert len(policy.space)==1
    drawn = policy.draw_under(torch.zeros(6, 1), gen(1))
    with policy.on_layers(model, lambda: drawn):
        a,b = model(x)
        c,_ = checkpoint(model, x, use_reentrant=False)
        assert torch.equal(a, b) and torch.equal(a, c)
        g = [torch.autograd.grad(o.sum(), x)[0] for o in (a,c)]
    assert torch.equal(*g) and torch.equal(g[0]==0, a==0)

NEW = {'dropout': lambda: Dropout([0.05,0.5,0.]), 'colours': ColorJitter, 'holes': CutoutHoles, 'input dropout': InputDropout,
       'input scale': InputScale, 'smoothing': LabelSmoothing}

@pytest.mark.parametrize('what', NEW)
def test_new_policies_are_policies(what):
    policy = NEW[what]()
    check_policy(policy)
    check_policy(policy, channels=1, sigma=0.5)
    lam = torch.randn(len(policy.space), generator=gen(), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda l: policy.expected(l, 0.7), lam.requires_grad_()) # central differences, float64

@pytest.mark.parametrize('what', ['colours','holes','input dropout','input scale'])
def test_what_is_done_to_an_image_is_its_own(what):
    policy,x = NEW[what](),torch.rand(8, 3, 9, 7, generator=gen())
    drawn = policy.draw_under(torch.randn(8, len(policy.space), generator=gen(1)), gen(2))
    assert torch.equal(policy.apply(x, drawn, gen()), torch.cat([policy.apply(x[i:i+1], rows(drawn, slice(i,i+1)), gen()) for i in range(8)]))

def test_the_hypergradient_is_that_of_finite_differences():
    "Through the hyper-layers and the mean of the dose, in float64; rates have no other way into the loss"
    model = net().double()
    for i in (2,7): model[i] = nn.Softplus() # a ReLU within the step has two slopes
    policy = Dropout().for_model(model)
    lam,x,y = policy.space.start().double(),torch.randn(6, 3, 8, 8, generator=gen(), dtype=torch.float64),torch.arange(6)
    z,loss = (lambda l: policy.expected(l, 1.)),lambda: F.cross_entropy(model(x), y)
    hyper = HyperNet([('0',model[0]),('6',model[6])], 2)
    with torch.no_grad():
        for p,_ in hyper.params: p.copy_(torch.randn(p.shape, generator=gen(p.numel()), dtype=p.dtype))
    drawn = policy.draw_under(lam.expand(6, -1), gen())
    with hyper.attached(z(lam)),policy.on_layers(model, lambda: drawn): # on, and yet off in the hyper-step
        value,g = hyper.hypergradient(model, loss, lam, z)
        steps = [hyper.losses_at(model, loss, [z(lam+s*e) for e in torch.eye(2).double()]) for s in (1e-5,-1e-5)]
    assert torch.equal(value, F.cross_entropy(model.eval()(x), y))
    assert g.abs().min()>1e-6 and torch.allclose(g, (steps[0]-steps[1])/2e-5, rtol=1e-5, atol=1e-9)

# --- in a fit

class Watch(Callback):
    "In training batches, whether the dropout layers act by the rates of the samples"
    order = 60
    def __init__(self): self.on = []
    def before_batch(self):
        cb = next(c for c in self.learn.cbs if isinstance(c, PolicyCallback))
        if not self.training: return
        t = next(t for t in cb.tfms if t.policy.name=='Dropout')
        x = torch.ones(len(self.xb[0]), 4000)
        off = (self.learn.model[8](x)==0).float().mean(1)
        self.on.append(((off-t.drawn.rate[:,1]).abs() < 5*0.5/4000**0.5).all().item())

class Off(HBACallback):
    "A search whose hyper-steps say what dropout does in them"
    def target_loss(self, b):
        x = torch.ones(3, 50)
        self.seen = [*getattr(self, 'seen', []),torch.equal(self.learn.model[8](x), x)]
        return super().target_loss(b)

def test_on_in_training_batches_and_off_in_hyper_steps_and_evaluation():
    learn,watch = learner(),Watch()
    learn.fit(1) # the optimizer has its states
    before = fingerprint(learn)
    class Evaluated(Callback):
        def before_validate(self): assert torch.equal(self.learn.model.eval()[8](torch.ones(3, 50)), torch.ones(3, 50))
    hba = Off(policy=PBAPolicy()+Dropout(), warmup=0., T_train=2, seed=0)
    learn.fit(2, 1e-2, cbs=[hba, watch, Evaluated()])
    assert len(watch.on)==10 and all(watch.on) and len(hba.seen)>=4 and all(hba.seen)
    assert_plain(learn, before)
    assert [m.p for _,m in dropout_layers(learn.model)]==[0.3,0.3]
    assert hba.schedule.space.names[-2:]==['dropout_0','dropout_1'] and hba.schedule.values(0)['dropout_1']==pytest.approx(0.3)
    assert not torch.equal(hba.schedule.table[0,-2:], hba.schedule.table[-1,-2:])

def test_rates_that_are_too_high_fall():
    torch.manual_seed(0)
    learn = small_learner(model=net(0.7, c=16), n_train=200, n_valid=100)
    learn.fit(12, 1e-2, cbs=HBACallback(policy=Dropout(), T_train=2, warmup=0.2, seed=0))
    rates = learn.hba_schedule.values(1)
    assert max(rates.values()) < 0.6, rates

def test_where_a_search_starts():
    learn = learner()
    hba = HBACallback(policy=Dropout(), start={'dropout_1': 0.6}, seed=0)
    learn.fit(1, cbs=hba)
    assert hba.schedule.values(0)==pytest.approx({'dropout_0': 0.3, 'dropout_1': 0.6})
    with pytest.raises(ValueError, match="start names 'dropout_7'"): learn.fit(1, cbs=HBACallback(policy=Dropout(), start={'dropout_7': 0.6}))
    with pytest.raises(ValueError, match='2 rates of dropout, and Sequential has 1'): small_learner(model=nn.Sequential(*net()[:8], net()[9])).fit(1, cbs=hba)

def found(n=2, at=0.5):
    return Schedule([0.,1.], [[0.2]*n,[at]*n], spaces={'Dropout': Dropout([0.1]*n).space}, sigma=0.)

def test_a_schedule_goes_to_another_network_from_its_file_alone(tmp_path):
    file,learn,watch = found().save(tmp_path/'s.json'),learner(0.05, c=12),Watch()
    learn.fit(1, 1e-2, cbs=[ScheduleCallback(file, seed=0), watch])
    assert all(watch.on) and len(watch.on)==5
    assert [m.p for _,m in dropout_layers(learn.model)]==[0.05,0.05]
    assert [m.p for _,m in dropout_layers(Schedule.load(file, policies=Dropout()).apply_to(learn.model))]==[0.5,0.5]
    with pytest.raises(ValueError, match='3 rates of dropout, and Sequential has 2'): learn.fit(1, cbs=ScheduleCallback(found(3)))
    other = Schedule([0.], PBAPolicy().space.lo[None])
    with pytest.raises(ValueError, match='holds the hyperparameters of PBAPolicy and no rates'): other.apply_to(learn.model)

@pytest.mark.filterwarnings('ignore:.*has no image of')
def test_target_images_that_join_late_have_the_rates_of_their_rows():
    learn,watch = learner(),Watch()
    target = digits_dls(40, 40, bs=20, size=12, seed=3).train
    learn.fit(3, 1e-2, cbs=[HBACallback(policy=Dropout()+LabelSmoothing(), target=target, until=0.5, T_train=2, seed=0), watch])
    assert all(watch.on) and len(watch.on)==15

def test_a_search_goes_on_from_its_checkpoint(tmp_path):
    "Stopped behind an epoch and gone on with, it ends as the uninterrupted one, to the last bit"
    def fit(file, stop=None):
        learn = learner()
        learn.path = tmp_path
        class Stop(Callback):
            order = 70
            def after_epoch(self):
                if self.epoch==stop: raise KeyboardInterrupt
        hba = HBACallback(policy=Dropout()+LabelSmoothing(), warmup=0., T_train=2, seed=0, checkpoint=file, resume=True)
        try: learn.fit(3, 1e-2, cbs=[hba, Stop()])
        except KeyboardInterrupt: pass
        return hba.schedule
    whole,_ = fit('a'),fit('b', stop=1)
    assert fit('b')==whole

def test_exported_and_pickled_after_a_search(tmp_path):
    learn = learner()
    learn.fit(1, cbs=(hba := HBACallback(policy=Dropout()+LabelSmoothing(), seed=0)))
    learn.export(tmp_path/'e.pkl')
    assert 'forward' not in vars(load_learner(tmp_path/'e.pkl').model[3])
    assert pickle.loads(pickle.dumps(hba.policies)).space.names==['dropout_0','dropout_1','smoothing']

def test_a_model_is_copied_and_saved_within_a_fit(tmp_path):
    class Save(Callback):
        def after_batch(self):
            if self.training: torch.save(self.learn.model, tmp_path/'m.pth')
    learn = learner()
    learn.fit(1, cbs=[PolicyCallback(Dropout(), seed=0), Save()])
    again = torch.load(tmp_path/'m.pth', weights_only=False)
    assert again(torch.rand(2,3,12,12)).shape==(2,10)

# --- what is refused

def test_what_is_not_found_is_refused():
    learn = small_learner()
    for cb in (HBACallback(policy=Dropout()),PolicyCallback(Dropout())):
        with pytest.raises(ValueError, match='finds no nn.Dropout, 1d, 2d or 3d with a rate above 0 in Sequential'): learn.fit(1, cbs=cb)
    assert 'Dropout' not in str(learn.cbs)
    class Other(nn.Dropout):
        def forward(self, x): return x
    assert dropout_layers(nn.Sequential(nn.Dropout(0), Other(0.5), nn.AlphaDropout(0.5)))==[]

def test_a_layer_that_sees_other_rows_is_refused_in_the_first_batch():
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 40), nn.Unflatten(1, (4,10)), nn.Flatten(0, 1), nn.Dropout(0.1), nn.Unflatten(0, (-1,4)), nn.Flatten())
    learn = small_learner(model=nn.Sequential(model, nn.Linear(40, 10)))
    before = [p.clone() for p in learn.model.parameters()]
    with pytest.raises(ValueError, match='layer `0.4` got a batch of 80 where 20 samples'): learn.fit(1, cbs=PolicyCallback(Dropout()))
    assert all(torch.equal(p, q) for p,q in zip(before, learn.model.parameters())) and 'forward' not in vars(model[4])

def test_a_layer_that_never_runs_is_named():
    class Idle(nn.Sequential):
        def forward(self, x): return self[0](x)
    learn = small_learner(model=Idle(net(), nn.Dropout(0.4)))
    with pytest.warns(UserWarning, match='layer `1` has never run'): learn.fit(1, cbs=PolicyCallback(Dropout()))

def test_outside_of_fastai():
    with pytest.warns(UserWarning, match='Dropout acts within the model'): tfm = found().transform(0.5)
    x = torch.rand(2, 3, 8, 8)
    assert torch.equal(tfm(x), x)
    holes = CutoutHoles()
    with pytest.raises(ValueError, match='CutoutHoles acts on normalized images'): Schedule([0.], [[4.,1.]], spaces={'CutoutHoles': holes.space}).transform(0.5)

# --- the loss

def test_smoothing_acts_on_training_losses_alone_also_with_accumulation():
    plain,seen = CrossEntropyLossFlat(),[]
    class See(Callback):
        order = 5 # before GradientAccumulation divides
        def after_loss(self): seen.append((self.training, self.loss.item(), self.learn.pred.detach().clone(), self.learn.yb[0]))
    learn = learner(loss_func=plain)
    learn.fit(1, cbs=[HBACallback(policy=LabelSmoothing(), sigma=0.5, warmup=0., T_train=1, seed=0), See(), GradientAccumulation(40)])
    for training,loss,pred,y in seen:
        assert (abs(loss-plain(pred, y).item()) < 1e-6) != training
    assert learn.loss_func is plain and {t for t,*_ in seen}=={True,False}

def test_losses_that_are_no_mean_over_samples_are_refused_before_the_first_step():
    weighted,opaque = CrossEntropyLossFlat(weight=torch.arange(1., 11.)),lambda p, y: F.cross_entropy(p, y)
    for loss,match in ((weighted,'is not the mean'), (opaque,'gives none for each sample')):
        learn = learner(loss_func=loss)
        before = [p.clone() for p in learn.model.parameters()]
        with pytest.raises(ValueError, match=match): learn.fit(1, cbs=PolicyCallback(LabelSmoothing()))
        assert learn.loss_func is loss and all(torch.equal(p, q) for p,q in zip(before, learn.model.parameters()))
    with pytest.raises(ValueError, match='MixUp mixes samples'): learner().fit(1, cbs=[PolicyCallback(LabelSmoothing()), MixUp()])

# --- undo

class InterruptWithin(Interrupt):
    "The same in the modules of policies within, to the end of the first batch"
    ours = tuple(str(Path(hba_fastai.__file__).parent/f) for f in ('inside.py','dropout.py','jitter.py','smoothing.py'))
    def before_batch(self): pass
    def after_batch(self): sys.settrace(None)

@pytest.mark.parametrize('kept', [False,True])
def test_interrupted_at_any_line(kept):
    learn,done = small_learner(model=net(), n_train=20, n_valid=20),set()
    learn.fit(1) # the optimizer has its states
    before,loss = fingerprint(learn),learn.loss_func
    while True:
        cb,stop = PolicyCallback(Dropout()+LabelSmoothing(), seed=0),InterruptWithin(done)
        if kept: learn.add_cb(cb)
        try: learn.fit(1, cbs=[stop] if kept else [cb,stop])
        except KeyboardInterrupt: pass
        finally: sys.settrace(None)
        if kept:
            learn.validate()
            learn.remove_cb(cb)
        try: assert_plain(learn, before)
        except AssertionError as e: raise AssertionError(f'interrupted at {stop.at}: {e}') from None
        assert learn.loss_func is loss, stop.at
        if stop.at is None: break # it ran through
    assert len(done)>50, done

@pytest.mark.parametrize('when', ['after_pred','after_loss','after_backward','after_batch','after_train','after_validate'])
def test_a_foreign_error_leaves_nothing(when):
    learn = learner()
    before,loss = fingerprint(learn),learn.loss_func
    def boom(self): raise RuntimeError('boom')
    with pytest.raises(RuntimeError, match='boom'):
        learn.fit(1, cbs=[HBACallback(policy=Dropout()+LabelSmoothing(), seed=0), Callback(**{when: boom})])
    after = fingerprint(learn)
    assert after['modules']==before['modules'] and learn.loss_func is loss

# --- STN

def test_stn_is_what_the_table_says():
    table = dict(hue=(0.05,0.5), contrast=(0.05,1), sat=(0.05,1), bright=(0.05,1), indropout=(0.05,1), inscale=(0.05,0.3), cutlength=(4,24), cutholes=(1,4))
    rows = {f'dropout_{i}': (0.05,0.9) for i in range(5)} | table | {f'dropout_{i}': (0.05,0.9) for i in (5,6)}
    space = stn_space()
    assert space.names==list(rows) and [hi for _,hi in space.ranges]==[hi for _,hi in rows.values()] and {lo for lo,_ in space.ranges}=={0}
    assert space.named(space.start())==pytest.approx({k: v for k,(v,_) in rows.items()}, rel=1e-4)
    policy = stn_policy().for_model(stn_alexnet(width=1/16))
    assert {n: h[:2] for n,h in policy.space.of.items()}=={n: h[:2] for n,h in space.of.items()}
    at = {p.name: p.order for p in policy.parts if p.acts('apply')}
    assert at['ColorJitter']<Normalize.order<at['CutoutHoles']<at['InputDropout']<at['InputScale']
    shapes = [tuple(m.weight.shape) for m in stn_alexnet() if isinstance(m, (nn.Conv2d,nn.Linear))]
    assert shapes==[(64,3,3,3),(192,64,3,3),(384,192,3,3),(256,384,3,3),(256,256,3,3),(4096,1024),(4096,4096),(10,4096)]

@pytest.mark.parametrize('name,space', [('LabelSmoothing', Space(other=(0,0.5))), ('Dropout', Space(a=(0,0.9), b=(0,0.9))),
                                        ('Dropout', Space(dropout_0=(0,0.5)))])
def test_a_file_with_other_hyperparameters_under_our_names_is_refused(name, space):
    schedule = Schedule([0.,1.], space.values(space.start())[None].repeat(2, 1), spaces={name: space})
    with pytest.raises(ScheduleError, match=f'The hyperparameters of {name} or their ranges are others'): ScheduleCallback(schedule)

@pytest.mark.parametrize('loss', [nn.CrossEntropyLoss(weight=torch.tensor([1.]*9+[20.])), CrossEntropyLossFlat(weight=torch.tensor([1.]*9+[20.])),
    functools.partial(F.cross_entropy, weight=torch.tensor([1.]*9+[20.]))])
def test_a_loss_that_weighs_classes_is_refused_by_any_batch(loss):
    "Also by one without the class of another weight, where both means are the same"
    x,y = torch.randn(6,10),torch.arange(6)
    with pytest.raises(ValueError, match='weighs classes'): SampledLoss(loss, [(LabelSmoothing(),lambda: torch.zeros(6))])(x, y)
    plain = SampledLoss(nn.CrossEntropyLoss(), [(LabelSmoothing(),lambda: torch.zeros(6))])
    assert plain(x*float('nan'), y).isnan() and not plain.checked and plain(x.double(), y)==pytest.approx(F.cross_entropy(x, y).item()) and plain.checked
