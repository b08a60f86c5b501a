"Several fits, companions that judge by the same images, other transforms at replay, and searches that cannot find anything"
import warnings
import pytest, torch
from fastai.callback.core import Callback,CancelFitException,CancelTrainException
from fastai.callback.tracker import EarlyStoppingCallback,ReduceLROnPlateau,SaveModelCallback
from fastai.callback.mixup import CutMix,MixUp
from fastai.callback.training import GradientAccumulation,ShortEpochCallback
from fastai.data.core import TfmdDL
from fastai.learner import Learner
from fastai.losses import MSELossFlat
from fastai.torch_core import set_seed
from fastai.vision.augment import Flip,IntToFloatTensor,aug_transforms
from fastai.vision.core import TensorImage
from torch import nn
from conftest import quiet,small_learner,small_net
from hba_fastai.search import HBACallback,ScheduleCallback
from hba_fastai.pba import PBAPolicy
from hba_fastai.replay import PolicyCallback
from hba_fastai.smoothing import LabelSmoothing
from hba_fastai.data import array_dls,digits
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace,TABLE7

def split_learner(**kw): return small_learner(splitter=lambda m: [list(m[:4].parameters()),list(m[4:].parameters())], **kw)

class Progress(Callback):
    "Notes the progress of the search or the replay at each training batch"
    order = 40
    def __init__(self): self.at = []
    def before_batch(self):
        if self.training: self.at.append((getattr(self.learn, 'hba', None) or self.learn.schedule).progress())

def test_a_class_would_be_two_searches():
    with pytest.raises(ValueError, match=r'makes a new HBACallback in each of its two fits.*give one, `HBACallback\(...\)`'):
        split_learner().fine_tune(2, cbs=HBACallback)

def climbing(): return Schedule([0,1], PBASpace().values(torch.stack([torch.full((54,), v) for v in (-5.,5.)])))

@pytest.mark.parametrize('make', [lambda: HBACallback(seed=0), lambda: ScheduleCallback(climbing(), seed=0)])
@pytest.mark.parametrize('kept', [False,True])
@pytest.mark.filterwarnings('ignore:The search goes on')
def test_fine_tune_is_one_course(make, kept):
    "Search and replay see the same progress over both fits, once and again"
    cb,want = make(),torch.arange(30)/30
    learn = split_learner(cbs=cb if kept else None)
    for _ in range(2):
        see = Progress()
        learn.fine_tune(2, cbs=[see] if kept else [cb,see]) # 10 batches frozen, 20 thawed
        at = torch.tensor(see.at)
        if isinstance(cb, HBACallback) and len(cb.schedule)>5: want = (30+torch.arange(30))/60 # a search goes on
        assert torch.allclose(at, want, atol=1e-6)

def test_the_warm_up_is_a_share_of_both_fits():
    "Half of four epochs: the first hyper-step comes with the last batch of the second"
    learn,hba,steps = split_learner(),HBACallback(warmup=0.5, T_train=2),[]
    class Steps(Callback):
        order = 40
        def after_epoch(self): steps.append(len(self.learn.hba.hyper_steps))
    learn.fine_tune(3, cbs=[hba,Steps()])
    assert steps==[0,1,5,5] and hba.rate==0.1 and abs(hba.clock.wait-2)<1e-9

def test_alpha_goes_with_the_hyper_steps_that_are_made():
    """Gradient accumulation makes fewer real steps than batches, and the warm-up fewer hyper-steps than that;
    the one step more comes at the very end of the warm-up"""
    hba,learn,made = HBACallback(warmup=0.25, T_train=2, T_val=50, moves=1),small_learner(n_train=400),[]
    class Steps(Callback):
        order = 40
        def after_epoch(self): made.append(len(self.learn.hba.hyper_steps))
    learn.fit(8, cbs=[hba, GradientAccumulation(40), Steps()])
    assert sum(made)==1550 and abs(hba.rate*1500-90)<1e-6

def test_an_interrupted_course_begins_anew():
    learn,cb = split_learner(),ScheduleCallback(climbing(), seed=0)
    class Stop(Callback):
        order = 30
        def before_epoch(self):
            if self.n_epoch==2: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fine_tune(2, cbs=[cb,Stop()])
    learn.fine_tune(2, cbs=[cb, see:=Progress()])
    assert torch.allclose(torch.tensor(see.at), torch.arange(30)/30, atol=1e-6)

def test_each_fold_is_a_search_of_its_own():
    "One callback over k folds: another model is another search, said in one sentence; each Learner keeps its schedule"
    hba,learns = HBACallback(seed=0),[]
    for fold in range(3):
        learn = split_learner(seed=fold)
        with warnings.catch_warnings(record=True) as w:
            warnings.simplefilter('always')
            learn.fine_tune(1, cbs=hba)
        said = [str(o.message) for o in w if 'a new search begins' in str(o.message)]
        assert len(said)==(fold>0), said
        learns.append(learn)
    for l in learns:
        assert l.hba_schedule.progress.tolist()==[0,0.3,0.5,1] and torch.allclose(l.hba_schedule.table[0], learns[0].hba_schedule.table[0])

@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('make', [lambda: EarlyStoppingCallback(patience=9), lambda: ReduceLROnPlateau('accuracy', patience=9),
                                  lambda: SaveModelCallback('accuracy', fname='m')])
def test_monitors_of_what_lambda_is_fitted_to_are_named_once(make, tmp_path):
    learn = small_learner(path=tmp_path)
    with pytest.warns(UserWarning, match='monitors .* on the images that the hyper-steps are fitted to') as w: learn.fit(2, cbs=[HBACallback(), make()])
    assert len([o for o in w if 'monitors' in str(o.message)])==1
    with pytest.warns(UserWarning, match='monitors'): learn.fit(1, cbs=[HBACallback(valid=learn.dls.valid), make()])
    with warnings.catch_warnings():
        warnings.filterwarnings('error', '.*monitors')
        learn.fit(1, cbs=[HBACallback(valid=0.2), make()])

def test_replay_beside_other_transforms_warns():
    x,y = digits(12)
    dls = lambda *tfms: array_dls((x[:200],y[:200]), (x[200:300],y[200:300]), vocab=range(10), bs=20, batch_tfms=tfms)
    learn,hba = small_learner(dls=dls(Flip())),HBACallback(seed=0)
    learn.fit(1, cbs=hba)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        small_learner(dls=dls(Flip())).fit(1, cbs=ScheduleCallback(hba))
    with pytest.warns(UserWarning, match=r'found beside Flip.* and this training has .*Warp'):
        small_learner(dls=dls(*aug_transforms(size=12))).fit(1, cbs=ScheduleCallback(learn))
    with pytest.warns(UserWarning, match='has no other augmentation'): small_learner(dls=dls()).fit(1, cbs=ScheduleCallback(hba))

def test_a_callback_that_has_not_searched_is_no_schedule():
    with pytest.raises(ValueError, match='has no schedule yet'): ScheduleCallback(HBACallback())
    with pytest.raises(ValueError, match='has no schedule, because no search'): ScheduleCallback(small_learner())
    for o in (None,3):
        with pytest.raises(TypeError, match='is no schedule: give a Schedule'): ScheduleCallback(o)

class Pairs:
    "Images to be restored: the target is an image too"
    n_inp = 1
    def __init__(self, n): self.x = digits(12)[0][:n]
    def __len__(self): return len(self.x)
    def __getitem__(self, i): return TensorImage(self.x[i]),TensorImage(self.x[i])

def test_images_that_are_targets_stay_as_they_are():
    from fastai.data.core import DataLoaders
    dls = DataLoaders(*[TfmdDL(Pairs(n), bs=20, shuffle=i==0, drop_last=i==0, num_workers=0, after_batch=[IntToFloatTensor()],
                               device=torch.device('cpu')) for i,n in enumerate((200,40))])
    model = nn.Sequential(nn.Conv2d(3,8,3,1,1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,3,3,1,1))
    set_seed(0)
    learn = Learner(dls, model, loss_func=MSELossFlat())
    learn.logger,seen,clean = quiet,[],{tuple(o.flatten().tolist()) for o in Pairs(200).x}
    class See(Callback):
        order = 60
        def before_batch(self):
            if self.training:
                seen.append(((self.x-self.y).abs().flatten(1).max(1).values>0).float().mean().item())
                assert all(tuple((o*255).round().byte().flatten().tolist()) in clean for o in self.y)
    with learn.no_bar(),pytest.warns(UserWarning, match='against their targets .TensorImage.'): learn.fit(1, cbs=[HBACallback(start=0.5, warmup=0), See()])
    assert min(seen)>0.3 # the inputs are augmented

# --- nothing to learn from: the reason instead of "noise"

def one_class_dls():
    x,y = digits(12)
    i = (y==3).nonzero()[:60,0]
    return array_dls((x[:200],y[:200]), (x[i],y[i]), vocab=range(10), bs=20)

@pytest.mark.parametrize('lr,dls,kw,match', [(0., None, {}, 'The learning rate was 0'),
                                             (1e-2, one_class_dls, {}, "of one class, '?3'?"),
                                             (1e-2, None, dict(fast=False), 'The response to the policy never moved')])
@pytest.mark.filterwarnings('ignore')
def test_the_report_says_why_nothing_was_found(lr, dls, kw, match, capsys):
    learn,hba = split_learner(dls=dls and dls(), train_bn=False),HBACallback(seed=0, **kw)
    learn.create_opt(); learn.freeze()
    learn.fit(3, lr, cbs=hba)
    hba.report()
    import re
    out = capsys.readouterr().out
    assert re.search(match, out) and out.isascii()

@pytest.mark.parametrize('train_bn', [True,False])
def test_the_response_learns_where_its_layer_is_frozen_and_at_the_fastest_rate(train_bn):
    "phi belongs to the search: `slice(lr/100, lr)` and a frozen body do not starve it"
    learn,hba = split_learner(train_bn=train_bn),HBACallback(seed=0, hlr=1e-9)
    learn.create_opt(); learn.freeze()
    seen = {}
    class See(Callback):
        order = 40
        def before_train(self):
            seen.update(groups=[sum(any(p is q for q in g) for p,
                                    _ in self.learn.hba.net.params) for g in self.opt.param_lists],
                                    frozen=[p.requires_grad for p in self.model[:2].parameters()])
    learn.fit(2, slice(1e-4,1e-2), cbs=[hba,See()])
    assert seen['groups']==[0,4] and seen['frozen']==[False,False,train_bn,train_bn] and all(v.abs().max()>1e-5 for l in hba.net.layers for v in l.V.values())
    same = HBACallback(seed=0)
    learn.unfreeze(); learn.fit_one_cycle(1, 1e-2, cbs=[same,See()])
    assert seen['groups']==[4,0] # one rate: with its layer
    learn.fit_one_cycle(1, slice(1e-4,1e-2), cbs=[HBACallback(), See()])
    assert seen['groups']==[0,4]
    learn.fit_one_cycle(1, slice(1e-4,1e-2), cbs=[HBACallback.paper(), See()])
    assert seen['groups']==[4,0]

def target(): return array_dls(*[(digits(12)[0][i:i+60],digits(12)[1][i:i+60]) for i in (900,960)], vocab=range(10), bs=20).valid

@pytest.mark.parametrize('train,match', [(lambda l,cb: l.fine_tune(2, cbs=cb), r'0.01 of the head.s rate, .*use `fine_tune\(..., lr_mult=1\)`'),
                                         (lambda l,cb: l.fit_one_cycle(2, slice(1e-4,1e-2), cbs=cb), 'use one learning rate for all layers'),
                                         (lambda l,cb: l.fine_tune(2, lr_mult=1, cbs=cb), None), (lambda l,cb: l.fit_one_cycle(2, 1e-2, cbs=cb), None)])
def test_layers_that_are_too_slow_for_a_target_are_named_once(train, match):
    with warnings.catch_warnings(record=True) as w:
        warnings.simplefilter('always')
        train(split_learner(), HBACallback(valid=target(), seed=0))
        train(split_learner(), HBACallback(seed=0)) # without a target of one's own nothing is said
        if 'fine' in str(match): train(small_learner(), HBACallback(valid=target(), seed=0)) # one group has one rate
    said = [str(o.message) for o in w if 'first layers' in str(o.message)]
    import re
    assert len(said)==(match is not None) and (not match or re.search(match, said[0]))

def test_an_optimizer_without_the_layer_is_refused_with_a_target_too():
    learn = small_learner(splitter=lambda m: [list(m[4:].parameters())])
    with pytest.raises(ValueError, match="does not hold the hyper-layer's weight"): learn.fit(1, cbs=HBACallback(valid=target()))

# --- what a user forbids or bounds

def test_forbidden_and_bounded_operations(tmp_path):
    learn,hba = small_learner(),HBACallback(skip=['Invert'], limits={'Rotate': (0,10)}, start=0.5, hlr=1., warmup=0, seed=0)
    ops,most = set(),[0.]
    class See(Callback):
        order = 40
        def before_batch(self):
            if not self.training: return
            d = (getattr(self.learn, 'hba', None) or self.learn.schedule).tfms[0].drawn
            ops.update(list(TABLE7)[o] for o in d.op.unique().tolist() if o>=0)
            most.append(d.m[d.op==list(TABLE7).index('Rotate')].abs().max().item() if (d.op==list(TABLE7).index('Rotate')).any() else 0.)
    learn.fit(3, cbs=[hba,See()])
    assert 'Invert' not in ops and len(ops)==14 and 0<max(most)<=10
    hba.schedule.save(tmp_path/'s.json')
    s = Schedule.load(tmp_path/'s.json')
    assert s==hba.schedule and s.skip==['Invert'] and s.limits=={'Rotate': (0,10)} and s.frame()['Rotate_0.m'].max()<=10
    ops.clear(); most[:] = [0.]
    small_learner().fit(2, cbs=[ScheduleCallback(s), See()])
    assert 'Invert' not in ops and len(ops)>=12 and max(most)<=10

def test_one_operation_may_be_named_alone():
    learn,hba = small_learner(),HBACallback(skip='Invert', seed=0)
    learn.fit(1, cbs=hba)
    assert hba.schedule.skip==['Invert'] and hba.schedule.inactive==[]

def test_what_could_not_act_in_the_search_is_not_drawn_at_replay():
    "Color on grey images stays at its start, is marked, and has probability 0 where it could act"
    x,y = digits(12)
    grey = array_dls((x[:200,:1],y[:200]), (x[200:300,:1],y[200:300]), vocab=range(10), bs=20)
    learn,hba,drawn = small_learner(dls=grey, model=small_net(1)),HBACallback(start=0.5, seed=0),set()
    with pytest.warns(UserWarning, match='Color'): learn.fit(2, cbs=hba)
    assert hba.schedule.inactive==['Color'] and hba.schedule.frame()['Color_0.p'].nunique()==1
    class See(Callback):
        order = 40
        def before_batch(self):
            if self.training: drawn.update(self.learn.schedule.tfms[0].drawn.op.unique().tolist())
    small_learner().fit(2, cbs=[ScheduleCallback(hba), See()])
    assert list(TABLE7).index('Color') not in drawn and len(drawn)>=14

def test_provenance_says_how_it_was_found():
    learn,hba = small_learner(),HBACallback(seed=3)
    learn.fit_one_cycle(1, 1e-2, cbs=hba)
    p = hba.schedule.provenance
    want = dict(seed=3, lr=[1e-2], train_items=200, valid_items=100, classes=10, torch=torch.__version__, model='Sequential')
    assert {k: p[k] for k in want}==want
    assert {'fastai','date','why','layers','target','augmentation','batch_size'}<=set(p) and sum(p['target_classes'].values())==100

@pytest.mark.parametrize('condition', ['dose','lambda'])
def test_what_the_layers_respond_to_has_mean_zero(condition):
    "z is centred on its expectation under λ+ε: over 100,000 draws each mean is within 5 standard errors of 0 (at the bare λ the largest is beyond 10)"
    hba,zs,refs,bare = HBACallback(condition=condition, start=(0.3,0.3), seed=0),[],[],[]
    class Many(Callback):
        order = 40
        def before_batch(self):
            hba = self.learn.hba
            if zs or not self.training: return
            for _ in range(50):
                tfm = hba.tfms[0]
                tfm.lam_i = tfm.population(hba.lam.value, 2000)
                tfm.drawn = tfm.policy.draw_under(tfm.lam_i, tfm.generator)
                zs.append(hba.z_batch()-hba.net.ref)
            refs.append(hba.net.ref); bare.append(hba.bound.expected(hba.start))
            hba.net.respond(None)
    small_learner().fit(1, cbs=[hba,Many()])
    z = torch.cat(zs).double()
    worst = lambda z: (z.mean(0).abs()/(z.std(0)/len(z)**0.5).clamp(min=1e-12)).max()
    assert worst(z) < 5
    if condition=='dose': assert worst(z + refs[0] - bare[0]) > 10

class Judge(Callback):
    "Validates in the middle of a fit, as people do on a test set; fastai sets `learn.epoch` to 0 then"
    def __init__(self, event, order): self.event,self.order = event,order
    def __call__(self, event):
        if event==self.event and not self.learn.lock.locked(): self.learn.validate()

@pytest.mark.parametrize('event,order', [('after_epoch',0), ('after_epoch',80), ('after_train',0), ('after_train',80)])
def test_a_callback_that_validates(event, order, tmp_path):
    def search(*cbs, **kw):
        learn,hba = small_learner(path=tmp_path),HBACallback(seed=0, **kw)
        learn.fit(3, 1e-2, cbs=[hba,*cbs])
        return hba
    whole = search()
    assert search(Judge(event, order)).schedule==whole.schedule
    class Stop(Callback):
        order = 90
        def after_epoch(self):
            if not self.learn.lock.locked() and len(self.hba.points)==3: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): search(Judge(event, order), Stop(), checkpoint='s')
    assert search(Judge(event, order), checkpoint='s', resume=True).schedule==whole.schedule

@pytest.mark.parametrize('make', [HBACallback, lambda: PolicyCallback(PBAPolicy())])
def test_training_that_is_cancelled_before_it_begins(make):
    "To see how good the model is as it comes"
    class First(Callback):
        def before_train(self):
            if not self.learn.epoch: raise CancelTrainException
    learn = small_learner()
    learn.fit(2, cbs=[make(),First()])
    assert len(learn.recorder.values)==2

@pytest.mark.parametrize('make', [HBACallback,PolicyCallback])
def test_training_that_is_cancelled_in_a_batch_leaves_the_plain_loss(make):
    learn = small_learner(n_valid=90) # whose last batch is smaller
    learn.fit(2, cbs=[make(policy=LabelSmoothing(), seed=0),ShortEpochCallback(0.5, short_valid=False)])
    assert learn.recorder.values[-1][0]==pytest.approx(learn.validate()[0], rel=1e-5)

def test_a_frozen_fit_that_stops_early():
    "What is left is the course"
    class Stop(Callback):
        order = 90
        def after_epoch(self):
            if self.learn.n_epoch==3: raise CancelFitException
    learn,hba = small_learner(),HBACallback(seed=0)
    learn.fine_tune(5, freeze_epochs=3, cbs=[hba,Stop()])
    assert hba.course.total==hba.course.done==6 and hba.schedule.progress[-1]==1

@pytest.mark.parametrize('mix', [MixUp,CutMix])
def test_mixed_images_and_target_images(mix):
    "Refused before the mixing callback swaps the loss, in both orders"
    learn = small_learner()
    loss = learn.loss_func
    for order in (1,-1):
        with pytest.raises(ValueError, match=f'{mix.__name__} mixes images and their labels'):
            learn.fit(3, cbs=[PolicyCallback(PBAPolicy(), target=learn.dls.valid),mix()][::order])
        assert learn.loss_func is loss

def test_parts_of_the_course_after_a_second_fit():
    "λ was frozen in 3 of the first 10 epochs, which are now 10 of 40"
    learn,hba = small_learner(n_train=40),HBACallback(seed=0)
    learn.fit(10, cbs=hba)
    assert hba.schedule.provenance['warmup']==0.3
    with pytest.warns(UserWarning, match='goes on'): learn.fit(30, cbs=hba)
    assert hba.schedule.provenance['warmup']==pytest.approx(0.075)
