"Policies of a user's own: searched alone and beside PBA, saved, replayed, resumed; what check_policy refuses"
import copy,random,re
from pathlib import Path
import numpy as np
import pytest, torch
from fastai.callback.core import Callback
from fastai.data.transforms import Normalize
from fastai.vision.augment import IntToFloatTensor
from fastai.vision.core import TensorImage
from hypothesis import given,settings,strategies as st
from conftest import small_learner
from hba_fastai.checkpoint import CheckpointError,load_checkpoint
from hba_fastai.data import array_dls,digits,digits_dls
from hba_fastai.lam import Hyperparameters,adam,adam_start
from hba_fastai.pba import PBAPolicy
from hba_fastai.policy import Data,Policies,Policy,check_policy
from hba_fastai.replay import PolicyCallback,ScheduleCallback
from hba_fastai.schedule import Schedule,ScheduleError
from hba_fastai.search import HBACallback
from hba_fastai.space import PBASpace,Space
from hba_fastai.transform import generators_for,policies_in,policy_in
from torch import nn

rand = lambda v, generator: torch.rand(len(v), generator=generator, device=generator.device)
wide = lambda t: t[:,None,None,None]

class Noise(Policy):
    space = Space(noise=(0,0.2))
    def draw(self, v, generator): return v.noise*rand(v, generator)
    def dose(self, drawn): return drawn[:,None]
    def apply(self, x, drawn, generator): return x + wide(drawn)*torch.randn(x.shape, generator=generator, device=x.device)

class Darker(Policy):
    space = Space(dark=(0,0.5))
    def draw(self, v, generator): return v.dark
    def dose(self, drawn): return drawn[:,None]
    def apply(self, x, drawn, generator): return x*(1-wide(drawn))

class Flip(Policy):
    "Without hyperparameters, and so without a dose"
    def draw(self, v, generator): return rand(v, generator)<0.5
    def apply(self, x, drawn, generator): return torch.where(wide(drawn), x.flip(-1), x)

SUMS = {'alone': Noise, 'beside': lambda: PBAPolicy()+Noise(), 'two': lambda: Noise()+Darker(), 'bare': lambda: PBAPolicy()+Flip()}

class See(Callback):
    "What each policy drew, the images, and what the layers were conditioned on"
    order = 16
    def __init__(self): self.drawn,self.x,self.z = [],[],[]
    def before_batch(self):
        if not self.training: return
        cb = next(c for c in self.learn.cbs if isinstance(c, PolicyCallback))
        self.drawn.append({t.policy.name: t.drawn for t in cb.tfms})
        self.x.append(self.x_of())
        if isinstance(cb, HBACallback): self.z.append(cb.z_batch())
    def x_of(self): return self.learn.xb[0].as_subclass(torch.Tensor).clone()

def search(policy, n=3, seed=0, cbs=(), learn=None, **kwargs):
    learn = learn or small_learner(seed)
    learn.fit(n, 1e-2, cbs=[(hba := HBACallback(policy=policy, seed=5, **kwargs)), *cbs])
    return learn,hba

def is_plain(learn):
    layers = all('forward' not in vars(m) for m in learn.model.modules())
    return layers and learn.dls.train.after_batch.fs.map(type)==[IntToFloatTensor] and '_with_events' not in vars(learn) and len(learn.opt.all_params())==len(
        list(learn.model.parameters()))

# 1. A policy of one's own, from the search to the replay

@pytest.mark.parametrize('what', SUMS)
def test_a_search_has_its_hyperparameters_by_name(what):
    policy,see = SUMS[what](),See()
    learn,hba = search(policy, cbs=[see])
    s,names = hba.schedule,policy.space.names
    assert s.space.names==names==list(s.frame().columns) and list(s.spaces)==[p.name for p in Policies(policy).parts]
    assert torch.equal(s.table[0], Policies(policy).space.values(Policies(policy).space.start().double())) and not torch.equal(s.table[0], s.table[-1])
    width = {'PBAPolicy': 27, 'Flip': 0}
    assert see.z[0].shape==(20,sum(width.get(name, 1) for name in s.spaces)) and is_plain(learn)
    for name,drawn in see.drawn[0].items():
        if name!='PBAPolicy': assert drawn.shape==(20,)

@pytest.mark.parametrize('policy', [Noise(), Darker()], ids=['Noise','Darker'])
def test_it_is_really_applied(policy):
    "The images of a search are those of a training without it, after what was drawn"
    seen = []
    for cbs in ([],[HBACallback(policy=policy, seed=5)]):
        class Images(Callback):
            order = 16
            def before_batch(self):
                if self.training: seen.append(self.learn.xb[0].as_subclass(torch.Tensor).clone())
        see = See() if cbs else None
        small_learner().fit(1, cbs=[*cbs, Images(), *([see] if see else [])])
    plain,augmented = seen[0],seen[len(seen)//2]
    drawn = see.drawn[0][policy.name]
    if policy.name=='Darker': assert torch.equal(augmented, plain*(1-wide(drawn)))
    else: # a standard deviation of n numbers is known to 1/sqrt(2n)
        n = plain[0].numel()
        assert ((augmented-plain).flatten(1).std(1)/drawn-1).abs().max() < 5/(2*n)**0.5
    assert drawn.std()>0

@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    d,files = tmp_path_factory.mktemp('schedules'),{}
    for what,make in SUMS.items():
        learn,hba = search(make())
        files[what] = hba.schedule.save(d/f'{what}.json'),hba.schedule
    return files

@pytest.mark.parametrize('what', SUMS)
def test_saved_and_loaded(what, saved):
    file,schedule = saved[what]
    assert '"version": 3' in file.read_text()
    for s in (Schedule.load(file),Schedule.load(file, policies=SUMS[what]())): assert s==schedule and list(s.spaces)==list(schedule.spaces)

REVERSED = {'alone': Noise, 'beside': lambda: Noise()+PBAPolicy(), 'two': lambda: Darker()+Noise(), 'bare': lambda: Flip()+PBAPolicy()}

@pytest.mark.parametrize('what', SUMS)
def test_replayed_elsewhere(what, saved):
    "Another network, another number of epochs, the sum in another order: the same λ over the course, and the same draws"
    file,schedule = saved[what]
    def replay(policy):
        learn,see,lams = small_learner(model=nn.Sequential(nn.Flatten(), nn.Linear(432, 10))),See(),[]
        class Lam(Callback):
            order = 17
            def before_batch(self):
                if self.training: lams.append(torch.cat([t.lam() for t in self.learn.schedule.tfms]))
        learn.fit(5, cbs=[ScheduleCallback(file, policy=policy, seed=1), see, Lam()])
        assert is_plain(learn)
        return see,lams
    (a,lams),(b,others) = replay(SUMS[what]()),replay(REVERSED[what]())
    assert all(torch.equal(x, y) for x,y in zip(a.x, b.x)) and len(a.x)==50
    assert all(torch.equal(x, y) for x,y in zip(lams, others))
    for i in (0,25,49): assert torch.equal(lams[i], schedule.lam(i/50))

class Noisy(Noise): space = Space(noise=(0,0.3))
Noisy.__name__ = 'Noise'
class Renamed(Noise): space = Space(sound=(0,0.2))
Renamed.__name__ = 'Noise'
WRONG = {'none': (None, r'holds the hyperparameters of Noise \(noise\) and .*add it, as in `policy='), 'other': (Darker(), 'of Noise .noise. and'),
         'range': (Noisy(), 'of Noise or their ranges are others'), 'name': (Renamed(), 'of Noise or their ranges are others'),
         'more': (Noise()+Darker(), 'and none of Darker: leave that policy out')}

@pytest.mark.parametrize('wrong', WRONG)
@pytest.mark.parametrize('what', ['alone','beside'])
def test_a_replay_without_its_policy_is_refused(what, wrong, saved):
    policy,match = WRONG[wrong]
    with pytest.raises(ScheduleError, match=match) as e: ScheduleCallback(saved[what][0], policy=policy)
    assert '\n' not in str(e.value)
    if policy is not None:
        with pytest.raises(ScheduleError, match=match): Schedule.load(saved[what][0], policies=policy)

class Stop(Callback):
    order = 60
    def __init__(self, epoch, place, error): self.at,self.place,self.error = epoch,place,error
    def before_batch(self):
        if self.place=='middle' and self.training and self.learn.epoch==self.at and self.learn.iter==4: raise self.error
    def before_epoch(self):
        if self.place=='behind' and self.learn.epoch==self.at: raise self.error

@pytest.mark.parametrize('place,error', [('middle',KeyboardInterrupt()), ('behind',RuntimeError('power cut'))], ids=['interrupted','killed'])
@pytest.mark.parametrize('what', ['alone','beside','two','bare'])
def test_resumed_bit_for_bit(what, place, error, tmp_path):
    make,cfg = SUMS[what],dict(n_train=200, path=tmp_path)
    whole,a = search(make(), 4, learn=small_learner(**cfg))
    half = small_learner(**cfg)
    with pytest.raises(type(error)): search(make(), 4, learn=half, cbs=[Stop(2, place, error)], checkpoint='s')
    assert is_plain(half)
    torch.rand(7); other,b = search(make(), 4, learn=small_learner(seed=9, **cfg), checkpoint='s', resume=True)
    assert torch.equal(a.schedule.table, b.schedule.table) and list(a.schedule.spaces)==list(b.schedule.spaces)
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, other.model.state_dict()[k]), k
    for name,g in a.generators.items(): assert torch.equal(g.get_state(), b.generators[name].get_state()), name

def test_resumed_with_another_sum_is_refused(tmp_path):
    "Also with the same policies in another order, where λ would be exchanged: both start at the same position"
    stop = Stop(1, 'behind', RuntimeError('power cut'))
    with pytest.raises(RuntimeError): search(Noise()+Darker(), learn=small_learner(path=tmp_path), cbs=[stop], checkpoint='s')
    for policy in (Darker()+Noise(),Noise(),Noise()+Darker()+Flip(),PBAPolicy()+Noise()+Darker(),Noisy()+Darker()):
        with pytest.raises(CheckpointError, match='spaces='): search(policy, learn=small_learner(path=tmp_path), checkpoint='s', resume=True)

# 2. Streams

def test_another_policy_changes_no_draw():
    "As long as λ has not moved: within the warm-up"
    draws = {}
    for name,policy in dict(noise=Noise(), pba=PBAPolicy(), sum=PBAPolicy()+Noise(), reversed=Noise()+PBAPolicy()).items():
        search(policy, 2, cbs=[(see := See())], warmup=0.9)
        draws[name] = see.drawn
    for i in range(10):
        for k in ('sum','reversed'):
            assert torch.equal(draws['noise'][i]['Noise'], draws[k][i]['Noise'])
            assert all(torch.equal(a, b) for a,b in zip(draws['pba'][i]['PBAPolicy'], draws[k][i]['PBAPolicy']))

def test_streams_are_seeded_by_name():
    draw = lambda p, seed: torch.rand(8, generator=generators_for(Policies(p), seed, 'cpu')[p.name])
    assert torch.equal(draw(Noise(), 1), draw(Noisy(), 1)) # of the same name
    assert not torch.equal(draw(Noise(), 1), draw(Darker(), 1)) and not torch.equal(draw(Noise(), 1), draw(Noise(), 2))

# 3. The planted truth

def planted(seed, dark, policy, n=10, **kwargs):
    x,y = digits(12)
    train,valid,_ = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed)).split([600,600,len(x)-1200])
    target = (x[valid]*(1-dark)).round().byte()
    dls = array_dls((x[train],y[train]), (target,y[valid]), vocab=[str(o) for o in range(10)], bs=30)
    return search(policy, n, learn=small_learner(seed, dls=dls), **kwargs)[1]

@pytest.mark.parametrize('seed', range(3))
def test_a_dark_target_is_found(seed):
    "From 0.15: up to the darkness of the target (0.45), and down where the target is as training"
    at_the_end = lambda dark: planted(seed, dark, Darker()).schedule.values(1)['dark']
    assert at_the_end(0.45)>0.3 and at_the_end(0.)<0.15

class Faint(Darker):
    "The dose in other units: the network sees a thousandth"
    space = Space(faint=(0,0.5))
    def draw(self, v, generator): return v.faint
    def scale(self, sigma): return 1e-3*super().scale(sigma)

def test_one_second_moment_per_policy():
    "The gradients of one are orders of magnitude smaller: it moves all the same, and would not with one second moment for all"
    hba = planted(0, 0.45, Noise()+Faint(), pull=0., T_train=2, moves=1)
    g = hba.lam.gradients()
    large,small = g.pow(2).mean(0).sqrt().tolist()
    assert large>30*small>0
    moved = (hba.lam.value-hba.start).abs()
    shared = Hyperparameters(hba.start, groups=[2])
    for o in g: shared.step(o, hba.rate)
    stuck = (shared.value-hba.start).abs()
    assert hba.lam.groups==[1,1] and moved.min()>0.5 and stuck[0]>0.5 and stuck[1]<2*small/large*moved[1] # √2: the mean of two

def test_operations_that_are_left_out_do_not_make_the_others_faster():
    lam = torch.zeros(54)
    moved = []
    for n in (54,4):
        g = torch.zeros(54)
        g[:n] = 0.01
        moved.append(adam(lam, g, adam_start(lam), 0.1, groups=[54])[0][:4])
    assert torch.allclose(*moved)

# 4. check_policy

def class_of(base=Noise, **methods): return type('Mine', (base,), methods)
def hidden(self, v, generator):
    self.n = getattr(self, 'n', 0)+1
    return v.noise*rand(v, generator)/self.n
CHECKS = {
    'signed': (class_of(draw=lambda s,v,g: v.noise*torch.randn(len(v), generator=g)), 'does not move with noise'),
    'signed, mean given': (class_of(draw=lambda s,v,g: v.noise*torch.randn(len(v), generator=g), expected=lambda s,l,sigma=0.: 0*l),
                           'does not move with noise'),
    'detached': (class_of(dose=lambda s,d: d.detach()[:,None]), 'does not move with noise'),
    'rounded': (class_of(dose=lambda s,d: (d*100).round()[:,None]), 'does not move with noise'),
    'compared': (class_of(draw=lambda s,v,g: v.noise*(rand(v, g)<v.noise)), 'moves with noise by .* times what its gradient says'),
    'unused': (class_of(space=Space(noise=(0,0.2), more=(0,1))), 'does not move with more'),
    'torch': (class_of(draw=lambda s,v,g: v.noise*torch.rand(len(v))), 'draws from a global'),
    'numpy': (class_of(draw=lambda s,v,g: v.noise*float(np.random.rand())), 'draws from a global'),
    'python': (class_of(draw=lambda s,v,g: v.noise*random.random()), 'draws from a global'),
    'torch, in apply': (class_of(apply=lambda s,x,d,g: x+wide(d)*torch.randn_like(x)), 'draws from a global'),
    'own generator': (class_of(draw=lambda s,v,g: v.noise*float(np.random.default_rng().random())), 'other things with the same generator'),
    'own generator of the dose': (class_of(dose=lambda s,d: d[:,None]*float(np.random.default_rng().random())), 'other things with the same generator'),
    'memory': (class_of(draw=hidden), 'other things with the same generator'),
    'wrong mean': (class_of(expected=lambda s,l,sigma=0.: s.space.values(l)), 'away from the mean of dose number 0'),
    'wrong gradient': (class_of(expected=lambda s,l,sigma=0.: s.simulate(l, sigma).mean(0)*(l-l.detach()).exp()**2), 'times what its gradient says'),
    'mean of another width': (class_of(expected=lambda s,l,sigma=0.: s.simulate(l, sigma).mean(0).repeat(2)), 'its dose has 1 numbers'),
    'type': (class_of(apply=lambda s,x,d,g: (x*(1-wide(d))).double()), r'makes \(16, 3, 8, 6\) torch.float64 on cpu of'),
    'shape': (class_of(apply=lambda s,x,d,g: x[...,1:]), r'makes \(16, 3, 8, 5\).* of \(16, 3, 8, 6\)'),
    'device': (class_of(apply=lambda s,x,d,g: x.to('meta')), 'on meta of .* on cpu'),
    'no images': (class_of(apply=lambda s,x,d,g: None), 'makes a NoneType of'),
    'same images': (class_of(apply=lambda s,x,d,g: x), 'gives the images as they came'),
    'bytes': (class_of(on_bytes=True, apply=lambda s,x,d,g: x*(1-wide(d))), 'makes .* torch.float32 on cpu of .* torch.uint8'),
    'flat dose': (class_of(dose=lambda s,d: d), r'dose of Mine for 16 samples is \(16,\)'),
    'one dose': (class_of(dose=lambda s,d: d.mean()[None,None]), r'is \(1, 1\) torch.float32'),
    'empty dose': (class_of(dose=lambda s,d: d.new_zeros(len(d), 0)), r'is \(16, 0\)'),
    'whole dose': (class_of(dose=lambda s,d: (d*9).long()[:,None]), 'torch.int64'),
    'dose on another device': (class_of(dose=lambda s,d: d.to('meta')[:,None]), 'on meta: give floating-point'),
    'no tensor': (class_of(dose=lambda s,d: d.tolist()), 'is a list'),
    'NaN': (class_of(dose=lambda s,d: (d-1).sqrt()[:,None]), 'gives doses that are not finite'),
    'NaN at the end of the range': (class_of(dose=lambda s,d: torch.where(d>0.15, d*float('nan'), d)[:,None]), 'gives doses that are not finite'),
    'NaN in the images': (class_of(apply=lambda s,x,d,g: x*(wide(d)-1).log()), 'gives images that are not finite'),
    'one for all': (class_of(draw=lambda s,v,g: v.noise*torch.rand(1, generator=g)), 'depends on the others in its batch'),
    'mean of the batch': (class_of(draw=lambda s,v,g: v.noise.mean()*rand(v, g)), 'depends on the others in its batch'),
    'mixed images': (class_of(apply=lambda s,x,d,g: x.lerp(x.flip(0), wide(d))), 'depends on the others in its batch'),
    'squeezed': (class_of(dose=lambda s,d: d[:,None] if len(d)>1 else d), r'for 1 samples is \(1,\)'),
    'itself': (class_of(bind=lambda s,data: s), '`bind` of Mine gives itself'),
    'nothing': (class_of(bind=lambda s,data: None), '`bind` of Mine gives a NoneType'),
    'no space': (class_of(space=Space()), 'has no hyperparameters'),
    'no dose': (class_of(Policy, space=Space(noise=(0,1)), draw=Noise.draw, apply=Noise.apply), 'Mine has no `dose`'),
    'no draw': (class_of(Policy, space=Space(noise=(0,1))), 'Mine has no `draw`'),
    'no apply': (class_of(Policy, space=Space(noise=(0,1)), draw=Noise.draw, dose=Noise.dose), 'Mine has no `apply`')}

@pytest.mark.parametrize('what', CHECKS)
def test_wrong_policies_are_refused(what):
    kind,match = CHECKS[what]
    with pytest.raises((ValueError,NotImplementedError), match=match) as e: check_policy(kind())
    assert '\n' not in str(e.value) and len(str(e.value))<300

class Shot(Noise):
    "Draws as many random numbers as the values need: legitimate, though it shifts what others draw"
    def apply(self, x, drawn, generator): return torch.poisson(x.clamp(0, 1)/wide(drawn+1e-3), generator)*wide(drawn+1e-3)
class Sometimes(Policy):
    "A gate with its mean written down, and two doses"
    space = Space({'gate.p': (0,0.02), 'size': (0,1)})
    def draw(self, v, generator): return rand(v, generator)<v['gate.p'],v.size
    def dose(self, drawn): return torch.stack([drawn[0].float(),drawn[0]*drawn[1]], 1)
    def expected(self, lam, sigma=0.):
        p,size = self.space.expected(lam, sigma)
        return torch.stack([p,p*size])
    def apply(self, x, drawn, generator): return torch.where(wide(drawn[0]), x*(1-wide(drawn[1])), x)
class Bytes(Darker):
    on_bytes = True
    def apply(self, x, drawn, generator): return x if x.is_floating_point() and not len(x) else (x*(1-wide(drawn))).to(x.dtype)

@pytest.mark.parametrize('policy', [Noise(), Darker(), Shot(), Bytes(), PBAPolicy(), PBAPolicy(skip='Invert', limits={'Rotate': (0,5)}), Sometimes()],
                         ids=lambda p: p.name)
@pytest.mark.parametrize('channels', [3,1])
def test_right_policies_pass(policy, channels):
    if channels==1 and policy.name=='PBAPolicy':
        with pytest.warns(UserWarning, match='Color needs RGB'): check_policy(policy, channels)
    else: check_policy(policy, channels)

def test_the_same_for_all_samples_tells_nothing():
    with pytest.raises(ValueError, match='same for all samples at sigma=0'): check_policy(Darker(), sigma=0.)
    assert Darker().scale(0.).tolist()==[0] and Darker().scale(1.)>1
    check_policy(Noise(), sigma=0.)

# 5. Placement

class Buffered(Bytes):
    def __init__(self):
        super().__init__()
        self.register_buffer('table', torch.ones(3, dtype=torch.float64))

def types(learn_or_dls): return [type(getattr(t, 'policy', t)).__name__ for t in learn_or_dls.train.after_batch.fs]

@pytest.mark.parametrize('policy,place', [(Darker(),['IntToFloatTensor','Darker','Normalize']), (Bytes(),['Bytes','IntToFloatTensor','Normalize']),
    (class_of(Darker, order=99.5)(),['IntToFloatTensor','Normalize','Mine']), (class_of(Darker, order=5)(),['Mine','IntToFloatTensor','Normalize'])])
def test_its_place_among_the_transforms(policy, place):
    dls = digits_dls(100, 100, bs=20, batch_tfms=Normalize.from_stats([0.5]*3, [0.5]*3))
    with policy_in(dls, policy, lambda: torch.zeros(1), 1., torch.Generator()): assert types(dls)==place
    assert types(dls)==['IntToFloatTensor','Normalize']

def test_a_policy_on_floats_gets_floats_between_0_and_1():
    "The data are bytes, PBA acts on those, and Normalize comes last"
    got = {}
    class Look(Darker):
        def apply(self, x, drawn, generator): got[self.name] = x.clone(); return super().apply(x, drawn, generator)
    class Look8(Look): space,on_bytes = Space(dark8=(0,0.5)),True
    Look8.draw,Look8.apply = lambda s,v,g: v.dark8,lambda s,x,d,g: Look.apply(s, x, d, g).to(x.dtype)
    dls = digits_dls(100, 100, bs=20, batch_tfms=Normalize.from_stats([0.5]*3, [0.5]*3))
    policies = PBAPolicy(0.5)+Look()+Look8()
    with policies_in(dls, policies, policies.space.start, 1., generators_for(policies, 0, 'cpu')): x,_ = dls.train.one_batch()
    assert got['Look'].dtype==torch.float32 and 0<=got['Look'].min() and 0.5<got['Look'].max()<=1 and got['Look8'].dtype==torch.uint8
    assert -1<=x.min()<-0.9 and x.max()<=1 and types(dls)==['IntToFloatTensor','Normalize']

@pytest.mark.parametrize('policy', [Noise()+Darker(), Darker()+Noise(), Noise()+Darker()+PBAPolicy()], ids=lambda p: '+'.join(o.name for o in p.parts))
def test_two_policies_on_floats(policy):
    "Noise leaves [0,1], and the check of what comes in looks at what the data set gives"
    assert is_plain(search(policy, 1)[0])
    dls = digits_dls(100, 100, bs=20)
    dls.train.after_batch.fs[0].div = 1 # the data set gives other numbers: refused, whichever comes first
    with pytest.raises(ValueError, match='needs float images in'):
        with policies_in(dls, policy, policy.space.start, 1., generators_for(policy, 0, 'cpu')): dls.train.one_batch()

def test_all_inputs_are_augmented_alike_and_targets_are_not():
    x = torch.rand(20, 3, 4, 4)
    dls = digits_dls(100, 100, bs=20)
    dls.n_inp = 2
    with policy_in(dls, Darker(), lambda: torch.zeros(1), 1., torch.Generator().manual_seed(0)) as tfm:
        a,b,target = tfm((TensorImage(x),TensorImage(1-x),TensorImage(x.clone())), split_idx=0)
    factor = 1-wide(tfm.drawn)
    for got,want in ((a,x*factor),(b,(1-x)*factor),(target,x)): assert torch.equal(got.as_subclass(torch.Tensor), want)

def test_buffers_move_with_the_policy():
    policies = (Buffered()+PBAPolicy(0.5)).to('meta')
    assert {t.device.type for t in policies.state_dict().values()}=={'meta'}
    assert policies.parts[0].table.dtype==torch.float32 and policies.parts[0].space.lo.device.type=='meta' # no float64 there

@pytest.mark.parametrize('policy', [Noise()+PBAPolicy(), Buffered()], ids=['sum','buffer'])
def test_the_object_given_stays_as_it_is(policy):
    words = lambda: str([vars(p) for p in Policies(policy).parts]) # `fill` of PBAPolicy, too, which the first batch gives
    before = {k: copy.deepcopy(v) for k,v in policy.state_dict().items()},words()
    search(policy); search(policy)
    after = policy.state_dict(),words()
    assert after[1]==before[1] and all(torch.equal(v, after[0][k]) for k,v in before[0].items())

def broken(method, at):
    calls = []
    def f(self, *args):
        calls.append(1)
        if len(calls)>at: raise RuntimeError(f'broken {method}')
        return getattr(Noise, method)(self, *args)
    return type('Broken', (Noise,), {method: f})()

@pytest.mark.parametrize('at', [0,3,30])
@pytest.mark.parametrize('method', ['draw','apply','dose'])
@pytest.mark.parametrize('kept', [False,True], ids=['of the fit','of the Learner'])
def test_an_error_leaves_the_learner_as_it_was(kept, method, at):
    "From the first call on, early and late, also where the callback stays: the weights are where training had got, the rest is as before"
    learn,hba = small_learner(),HBACallback(policy=broken(method, at)+PBAPolicy(), seed=5)
    if kept: learn.add_cb(hba)
    what = lambda: (list(map(type, learn.cbs)),list(learn.metrics),learn.loss_func,learn.logger,learn.dls,learn.model,[type(o) for o in learn.model.modules()])
    before = what()
    with pytest.raises(RuntimeError, match=f'broken {method}'): learn.fit(5, 1e-2, cbs=[] if kept else hba)
    assert is_plain(learn) and what()==before
    if kept: learn.remove_cb(hba)
    learn.fit(1)

def test_a_replay_with_an_error_leaves_the_learner_as_it_was(saved):
    for method in ('draw','apply'):
        policy,learn = broken(method, 12),small_learner()
        type(policy).__name__ = 'Noise'
        with pytest.raises(RuntimeError, match='broken'): learn.fit(3, cbs=ScheduleCallback(saved['alone'][0], policy=policy))
        assert is_plain(learn)

# 6. Files of earlier versions

@pytest.mark.parametrize('file', sorted((Path(__file__).parent/'schedules').glob('*.json')), ids=lambda f: f.name)
def test_old_schedules_load(file):
    s = Schedule.load(file)
    assert list(s.spaces)==['PBAPolicy'] and s.space.names==PBASpace().names and ScheduleCallback(file).policies.parts[0].name=='PBAPolicy'

@pytest.mark.parametrize('version', [1,2,3,4,5,7,8])
def test_old_checkpoints_are_refused(version, tmp_path):
    learn,hba = search(Noise(), 1, learn=small_learner(path=tmp_path), checkpoint='s')
    file = tmp_path/'models'/'s.pth'
    data = file.read_bytes()
    assert data.startswith(b'hba-fastai checkpoint 9\n') and load_checkpoint(file)['epoch']==1
    file.write_bytes(data.replace(b'checkpoint 9', b'checkpoint %d' % version, 1))
    with pytest.raises(CheckpointError, match='older version of hba-fastai and cannot be continued: start a new search with another name'):
        search(Noise(), 1, learn=(other := small_learner(path=tmp_path)), checkpoint='s', resume=True)
    assert is_plain(other)

# 7. Odd sums, names and values

def test_sums_that_are_refused():
    with pytest.raises(ValueError, match='noise is a hyperparameter of both spaces'): Noise()+class_of()()
    with pytest.raises(ValueError, match='Noise is there twice'): PBAPolicy()+Noise()+Noise()
    with pytest.raises(ValueError, match='Noise is there twice'): (PBAPolicy()+Noise())+(Noise()+Darker())
    with pytest.raises(TypeError, match='no policy'): Noise()+nn.Linear(1, 1)
    with pytest.raises(ValueError, match='Flip has no hyperparameters to search'): HBACallback(policy=Flip())
    with pytest.raises(ValueError, match='skip and limits are of PBAPolicy'): HBACallback(policy=Noise(), skip='Invert')

def test_without_hyperparameters_it_acts_alone_and_beside_a_search():
    (learn := small_learner()).fit(1, cbs=[PolicyCallback(Flip(), seed=1), (see := See())])
    assert is_plain(learn) and see.drawn[0]['Flip'].any()
    _,hba = search(PBAPolicy()+Flip(), cbs=[(see := See())])
    assert see.drawn[0]['Flip'].any() and len(hba.lam)==54 and hba.schedule.spaces['Flip'].names==[]

class Skips(Flip): skip = ('Invert',)
def test_what_a_policy_without_hyperparameters_skips_is_its_own():
    "The values of PBA's Invert stay"
    _,hba = search(PBAPolicy()+Skips())
    assert hba.schedule.skip==[] and hba.schedule.values(1)['Invert_0.p']>0

class Mild(PBAPolicy):
    "A user's own kind of PBAPolicy"
    def __init__(self, share=0.5, **kwargs): super().__init__(**kwargs); self.share = share
    def apply(self, x, drawn, *args, **kwargs): return x
def test_a_subclass_of_pba_stays_one():
    mild = Mild(0.25, skip='Invert')
    with pytest.warns(UserWarning, match='Color needs RGB'): bound = mild.bind(Data(1, torch.tensor([0.3])))
    assert type(bound) is Mild and bound.share==0.25 and bound.inactive==['Invert','Color'] and bound.fill.tolist()==pytest.approx([0.3])
    assert mild.inactive==['Invert'] and mild.fill is None and bound.active.sum()==mild.active.sum()-4
    _,hba = search(mild, cbs=[(see := See())])
    assert list(hba.schedule.spaces)==['Mild'] and list(see.drawn[0])==['Mild']

@pytest.mark.parametrize('of', [(0,float('inf')), (float('-inf'),0), (float('nan'),1), (0,float('nan')), (1,1), (1,0), (0,1,0), (0,1,float('nan'))])
def test_ranges_that_are_refused(of):
    with pytest.raises(ValueError, match='odd goes from'): Space(odd=of)

@pytest.mark.parametrize('name', ['space','rows'])
def test_names_that_are_refused(name):
    with pytest.raises(ValueError, match=f"cannot have the name '{name}'"): Space({name: (0,1)})

@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6), st.floats(0.01, 0.99))
def test_any_range_can_be_checked_saved_and_read(lo, width, at):
    "Values in whatever unit: the scale makes the dose about one half wide, and the file gives them back"
    if not lo+width>lo or abs(lo)>1e3*width: return # float32 cannot tell the values apart
    kind = type('Odd', (Darker,), dict(space=Space(dark=(lo,lo+width,at)), draw=lambda s,v,g: v.dark*rand(v, g),
                                       apply=lambda s,x,d,g: (x*(1+wide(d)/(abs(lo)+width)))))
    policy = kind()
    check_policy(policy)
    assert 0.4 < (policy.scale(1.)*policy.simulate(policy.space.start(), 1., seed=3)).std() < 0.6
    s = Schedule([0,1], policy.space.values(torch.tensor([[-7.],[7.]]).double()), spaces={'Odd': policy.space})
    assert s.lam(1.).isfinite().all() and s.space.of['dark']==policy.space.of['dark']

# 8. Reports, tables and pictures

def test_a_report_speaks_of_all_policies(capsys):
    _,hba = search(PBAPolicy()+Noise()+Darker(), 4)
    df = hba.report()
    assert {'noise','dark','Rotate'}<=set(df.index) and len(df)==17 and capsys.readouterr().out
    assert df.loc['noise','value_0']==pytest.approx(hba.schedule.values(1)['noise'], rel=1e-5)

class Kinds(Darker):
    space = Space({'Fog_0.rate': (0,0.5), 'Fog_0.depth': (0,0.5)})
    def draw(self, v, generator): return torch.stack([v['Fog_0.rate'],v['Fog_0.depth']], 1)
    def dose(self, drawn): return drawn
    def apply(self, x, drawn, generator): return x*(1-wide(drawn.mean(1)))
def test_names_in_the_form_of_pba_with_kinds_of_their_own(capsys):
    check_policy(Kinds())
    _,hba = search(PBAPolicy()+Kinds(), 4)
    assert 'rate_0' in hba.report() and re.search(r'Fog.rate=0\.\d+, Fog.depth=0\.\d+', repr(hba.schedule))

@pytest.mark.parametrize('what', SUMS)
def test_pictures_tables_and_words(what, saved):
    import matplotlib.pyplot as plt
    schedule = saved[what][1]
    axs = schedule.plot()
    names = {t.get_text() for ax in axs for t in [*ax.texts,*(ax.get_legend().get_texts() if ax.get_legend() else [])]}
    assert {*schedule.space.groups()}<=names and len(axs)==1+(what in ('beside','bare'))
    plt.close('all')
    assert schedule.frame().shape==(len(schedule),len(schedule.space)) and ('noise=' in repr(schedule))==(what!='bare')
