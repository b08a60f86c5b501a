"A population: who becomes whose copy, when, with what; stopped anywhere it comes to the same end; bad input is refused in a sentence"
import os,signal
from types import SimpleNamespace
import numpy as np
import pytest, torch
from fastai.callback.core import Callback,CancelFitException
from fastai.data.core import DataLoaders
from fastai.callback.progress import CSVLogger
from fastai.callback.schedule import Learner # with `fit_one_cycle`
from fastai.callback.tracker import EarlyStoppingCallback,ReduceLROnPlateau,SaveModelCallback
from fastai.metrics import accuracy
from fastai.losses import CrossEntropyLossFlat,LabelSmoothingCrossEntropyFlat
from fastai.optimizer import SGD
from conftest import small_net
from torch import nn
from hba_fastai.data import digits_dls
from hba_fastai.dropout import Dropout
from hba_fastai.hpm import HPM
from hba_fastai.lam import Hyperparameters
from hba_fastai.member import JUMP,Member,gaussian
from hba_fastai.pba import PBAPolicy
from hba_fastai.population import PBT,Population
from hba_fastai.schedule import Schedule
from hba_fastai.search import ScheduleCallback
from hba_fastai.smoothing import LabelSmoothing
from hba_fastai.space import PBASpace,Space
from hba_fastai.transform import PolicyTransform

KINDS = {'algorithm 2': Population, 'pbt': PBT, 'hpm': HPM}

class Watch(Callback):
    "Notes λ and the images of each training batch: `seen[epoch]` is a list of (λ, images)"
    order,run_valid = 16,False
    def __init__(self): self.seen = {}
    def before_batch(self):
        tfm = next(t for t in self.dls.train.after_batch.fs if isinstance(t, PolicyTransform))
        self.seen.setdefault(self.learn.epoch, []).append((tfm.lam().clone(),self.learn.xb[0].clone()))

DLS = digits_dls(60, 40, bs=20, size=8)

def learner(*cbs, n=10): return Learner(DLS, small_net(n=n), cbs=[Watch(),*cbs])

def population(kind='pbt', make=learner, n=4, **kwargs):
    pop = KINDS[kind](make, n, **{'share': 0.25, **kwargs}) if kind!='algorithm 2' else Population(make, n, judge=20, **kwargs)
    pop.logger = lambda line: None
    return pop

def fit(pop, epochs=3):
    pop.fit_one_cycle(epochs, 1e-2)
    return pop

def watched(pop): return [m.learn.cbs[[type(o) for o in m.learn.cbs].index(Watch)].seen for m in pop.members]

def end_of(pop): return [m.read() for m in pop.members]

def same(a, b):
    "Are two checkpoints equal, but for the day and what they are called?"
    if isinstance(a, torch.Tensor): return torch.equal(a, b)
    if isinstance(a, dict): return a.keys()==b.keys() and all(same(v, b[k]) for k,v in a.items() if k!='provenance')
    if isinstance(a, (list,tuple)): return len(a)==len(b) and all(map(same, a, b))
    return a==b or a!=a and b!=b

def test_truncation_copies_the_best_over_the_worst_and_the_next_batch_has_the_new_values():
    "λ is set when the donor's state has been loaded: a restore that comes later would silently undo it"
    pop = fit(population(every=2), 6)
    assert [r['until'] for r in pop.rounds]==[2,4,6]
    seen,space = watched(pop),PBASpace()
    for r in pop.rounds[:-1]:
        e,losses = r['until'],r['losses']
        worst,best = losses.index(max(losses)),losses.index(min(losses))
        assert r['donors']==[best if i==worst else None for i in range(4)]
        last = [seen[i][e-1][-1][0] for i in range(4)]
        for i in range(4):
            new = seen[i][e][0][0]
            if i!=worst: assert torch.equal(new, last[i])
            else:
                ratio = space.values(new.double())/space.values(last[best].double())
                assert ((ratio-0.8).abs().minimum((ratio-1.2).abs())<1e-4).sum()>=50 and (ratio-1).abs().min()>0.01 # but for what is at its bound
    assert pop.rounds[-1]['donors']==[None]*4

@pytest.mark.parametrize('kind', KINDS)
def test_a_copy_has_all_of_its_donor_but_its_random_streams(kind, monkeypatch):
    copies,plain = [],Member.clone
    def clone(self, d, donor, epoch):
        plain(self, d, donor, epoch)
        if donor!=self.i: copies.append((d,self.read()))
    monkeypatch.setattr(Member, 'clone', clone)
    fit(population(kind, warmup=0.) if kind=='hpm' else population(kind), 2)
    for d,c in copies:
        for part in ('model','opt','scaler'): assert same(d['training'][part], c['training'][part])
        for part in ('lam','net','phi_state','policies','at','lams','clock'): assert same(d['search'][part], c['search'][part])
        assert not same(d['training']['rng'], c['training']['rng']) and d['training']['train_rng']!=c['training']['train_rng']
        assert d['search']['seed']!=c['search']['seed'] and not same(d['search']['generators'], c['search']['generators'])
        assert c['lineage'][:-1]==d['lineage']
    assert len(copies)==(3 if kind=='algorithm 2' else 1)

def test_members_see_other_orders_and_a_seed_gives_them_again():
    a,b,c = (fit(population(seed=s), 2) for s in (0,0,1))
    assert a.rounds==b.rounds and all(map(same, end_of(a), end_of(b))) and a.rounds!=c.rounds
    first = [seen[0][0][1] for seen in watched(a)]
    assert not any(torch.equal(first[i], first[j]) for i in range(4) for j in range(i))
    assert DLS.train.rng is not None and a.schedule==b.schedule!=c.schedule

def test_noise_of_algorithm_2_is_relative_to_each_tensor():
    cb = SimpleNamespace(learn=learner(), lam=Hyperparameters(torch.zeros(1000)))
    cb.learn.model[0].weight.data *= 100
    cb.learn.model[3].weight.requires_grad_(False)
    old = [p.detach().clone() for p in cb.learn.model.parameters()]
    gaussian(cb, torch.Generator().manual_seed(0), 0.5, 0.1)
    assert abs(cb.lam.value.std()-0.5)<5*0.5/2000**0.5
    for p,o in zip(cb.learn.model.parameters(), old):
        rms,n = o.square().mean().sqrt(),p.numel()
        if rms==0 or not p.requires_grad: assert torch.equal(p, o) # a bias that has not begun, a layer that is frozen
        elif n>=200: assert abs((p-o).std()/rms-0.1)<5*0.1/(2*n)**0.5

class PowerCut(BaseException): pass

class Cut(Callback):
    "Stops the member whose training is number `n`, in its last batch but one"
    count,run_valid = 0,False
    def __init__(self, n, how): self.at,self.how = n,how
    def before_batch(self):
        Cut.count += 1
        if Cut.count==self.at: self.how()

def cut(): raise PowerCut('power cut')
def kill(): os.kill(os.getpid(), signal.SIGKILL)

@pytest.mark.parametrize('kind,at', [('pbt',5), ('hpm',17)])
def test_stopped_anywhere_it_comes_to_the_same_end(kind, at, tmp_path):
    kw = dict(n=3, warmup=0.1) if kind=='hpm' else dict(n=3)
    whole = fit(population(kind, **kw))
    Cut.count = 0
    with pytest.raises(PowerCut): fit(population(kind, lambda: learner(Cut(at, cut)), checkpoint=tmp_path/'pop', **kw))
    again = fit(population(kind, checkpoint=tmp_path/'pop', resume=True, **kw))
    assert same(again.rounds, whole.rounds) and all(map(same, end_of(whole), end_of(again))) and whole.schedule==again.schedule
    assert all(torch.equal(p, q) for p,q in zip(whole.best.model.state_dict().values(), again.best.model.state_dict().values()))

@pytest.mark.parametrize('kind,at', [('pbt',2), ('algorithm 2',14)])
def test_stopped_the_same_object_goes_on_and_trained_it_is_not_trained_again(kind, at):
    "In the first round, when no checkpoint is complete, and later"
    whole = fit(population(kind, n=3))
    Cut.count = 0
    pop = population(kind, lambda: learner(Cut(at, cut)), n=3)
    with pytest.raises(PowerCut): fit(pop)
    if pop.rounds:
        with pytest.raises(ValueError, match=r'was stopped in `fit_one_cycle\(3, 0.01\)` and another fit would begin anew'): fit(pop, 2)
    fit(pop)
    assert same(pop.rounds, whole.rounds) and all(map(same, end_of(whole), end_of(pop))) and whole.schedule==pop.schedule
    for epochs in (3,4):
        with pytest.raises(ValueError, match='train its winner on, `pop.best.fit'): fit(pop, epochs)

@pytest.mark.parametrize('where', ['training',5,6]) # before that copy, of six in two rounds
def test_killed_it_comes_to_the_same_end(where, tmp_path, monkeypatch):
    "By SIGKILL, in the middle of an epoch, and where some of the copies are made"
    whole = fit(population('algorithm 2', n=3))
    pid = os.fork()
    if not pid:
        try:
            Cut.count = 0
            count,plain = [],Member.clone
            def clone(self, *args):
                count.append(0)
                if len(count)==where: kill()
                plain(self, *args)
            monkeypatch.setattr(Member, 'clone', clone)
            fit(population('algorithm 2', lambda: learner(Cut(14, kill if where=='training' else int)), n=3, checkpoint=tmp_path/'pop'))
        finally: os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==-signal.SIGKILL
    again = fit(population('algorithm 2', n=3, checkpoint=tmp_path/'pop', resume=True))
    assert same(again.rounds, whole.rounds) and all(map(same, end_of(whole), end_of(again)))

def test_a_finished_population_stays_finished_and_another_is_refused(tmp_path):
    a = fit(population(checkpoint=tmp_path/'pop'), 2)
    b = fit(population(checkpoint=tmp_path/'pop', resume=True), 2)
    assert a.rounds==b.rounds and a.schedule==b.schedule
    for kw,epochs,says in ((dict(seed=3), 2, 'seed=0 and this search has 3'), (dict(every=2), 2, 'every=1 and'), ({}, 3, 'fit=')):
        with pytest.raises(ValueError, match=says): fit(population(checkpoint=tmp_path/'pop', resume=True, **kw), epochs)
    assert all(map(same, end_of(a), end_of(b)))

def test_the_lineage_is_the_schedule():
    pop = fit(population('algorithm 2', n=2), 3)
    s,seen,lineage = pop.schedule,watched(pop),pop.schedule.provenance['lineage']
    assert len(lineage)==3 and s.progress.tolist()==pytest.approx([0,1/3,(1+JUMP)/3,2/3,(2+JUMP)/3,1], abs=1e-12)
    for e,(since,i) in enumerate(lineage):
        assert since==e and torch.allclose(s.lam((e+0.5)/3), seen[i][e][0][0], atol=1e-4)
    assert pop.best.hba_schedule==s and not any(isinstance(t, PolicyTransform) for t in DLS.train.after_batch.fs)

def test_the_winner_trains_on():
    "Asked for again, it is the same Learner as it is now; its schedule stays"
    plain = lambda: Learner(DLS, small_net())
    pop = fit(population('pbt', plain, n=2), 2)
    learn,schedule = pop.best,pop.schedule
    before = learn.model[0].weight.detach().clone()
    learn.fit(1, 1e-2)
    after = learn.model[0].weight.detach().clone()
    assert pop.best is learn and torch.equal(learn.model[0].weight, after) and not torch.equal(before, after) and pop.schedule==learn.hba_schedule==schedule

def test_a_course_of_another_form():
    pop = population(n=2)
    pop.fit_flat_cos(2, 1e-2)
    assert pop.settings['fit']=='fit_flat_cos(2, 0.01)' and pop.schedule.progress[-1]==1 and repr(pop).startswith('PBT of 2 members, at epoch 2, best loss ')

SAME = learner()
BAD = { # arguments of `population`, and of its fit; error, and what it says
    'n': (dict(n=1), ValueError, 'n=1 is the number of members'),
    'no function': (dict(make=SAME), TypeError, 'make_learner is a Learner'),
    'no learner': (dict(make=small_net), TypeError, 'gives a Sequential'),
    'nothing to compare by': (dict(make=lambda: Learner(DataLoaders(DLS.train), small_net())), ValueError, 'no validation data: make its `dls`'),
    'one object': (dict(make=lambda: SAME), ValueError, 'the same (Learner|Sequential|Watch|TrainEvalCallback) twice'),
    'one model': (dict(make=lambda: Learner(DLS, SAME.model)), ValueError, 'the same Sequential twice'),
    'one callback': (dict(make=lambda: Learner(DLS, small_net(), cbs=SAME.cbs[-1])), ValueError, 'the same Watch twice'),
    'space': (dict(policy=Space(noise=(0,1))), TypeError, 'is no policy: give objects'),
    'n as text': (dict(n='4'), ValueError, "n='4' is the number"), 'spread': (dict(spread=-1), ValueError, 'spread=-1 is a standard deviation'),
    'no name': (dict(checkpoint=''), TypeError, "checkpoint='' names a folder"), 'seed': (dict(seed=None), TypeError, 'seed=None is where'),
    'noise': (dict(kind='algorithm 2', noise='x'), ValueError, "noise='x' is the size of a noise"),
    'noise of λ': (dict(kind='algorithm 2', sigma=float('nan')), ValueError, 'sigma=nan is the size of a noise'),
    'checkpoint': (dict(checkpoint=5), TypeError, 'checkpoint=5 names a folder'), 'factors': (dict(by=(-1,2)), ValueError, r'by=\(-1, 2\) are the factors'),
    'one factor': (dict(by=1.2), ValueError, r'by=\(1.2,\) are the factors'),
    'sparing': (dict(kind='hpm', sparing=True), ValueError, 'sparing=True belongs to one training'),
    'hpm argument': (dict(kind='hpm', foo=1), TypeError, 'HPM knows no foo'), 'form': (dict(kind='hpm', form='x'), ValueError, "form='x' is unknown"),
    'teacher': (dict(kind='hpm', lr=-1), ValueError, 'lr=-1 is the learning rate of the teacher'),
    'every': (dict(every=0), ValueError, 'every=0 must be a whole number'),
    'resume': (dict(resume=True), ValueError, 'resume=True needs the name of a folder'),
    'argument': (dict(hlr=0.1), TypeError, "unexpected keyword argument 'hlr'"),
    'valid': (dict(kind='hpm', valid=0.2), ValueError, 'valid=0.2 holds other images out'),
    'mutation': (dict(kind='hpm', mutation='no'), ValueError, "mutation='no' is unknown"),
    'sigma': (dict(kind='hpm', sigma=0.), ValueError, 'sigma=0.0 and bound'),
    'rate': (dict(kind='hpm', hlr=-1.), ValueError, 'hlr=-1.0 is a learning rate'), 'm': (dict(kind='hpm', m=1), ValueError, 'm=1 is the number of patterns')}

@pytest.mark.parametrize('what', BAD)
def test_bad_input(what):
    kw,error,says = BAD[what]
    with pytest.raises(error, match=says): fit(population(**kw), 1)

def test_what_is_no_fit_of_a_population():
    with pytest.raises(NotImplementedError, match='fine_tune is two fits'): population().fine_tune(1)
    with pytest.raises(ValueError, match='n_epoch=True is the length'): fit(population(), True)

def test_several_processes_of_one_training_are_refused(monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='2 processes share one training here and a population has a training for each member'): fit(population())

def test_the_share_that_is_replaced():
    with pytest.raises(ValueError, match='share=0.7 is the part of members that are replaced'): PBT(learner, share=0.7)

@pytest.mark.parametrize('n', range(2, 12))
def test_a_donor_stays_and_has_not_diverged(n):
    "Also where half are replaced, of an odd number, and where most have diverged"
    pop,g = PBT(learner, n, share=0.5),torch.Generator().manual_seed(n)
    for until in range(50):
        losses = [l if l<1.5 else float('inf') for l in torch.rand(n, generator=g).mul(2).tolist()]
        losses[until%n] = 0.5
        donors = pop.donors(losses, until)
        assert all(losses[k]<float('inf') and donors[k] is None for k in donors if k is not None)
        assert 1<=sum(k is not None for k in donors)<=n//2

def test_what_a_schedule_says_of_its_origin():
    "By what it was found, as that of a search; steps of a member are no interruptions"
    for kind in ('pbt','hpm'):
        found = fit(population(kind, n=np.int64(2)), 2).schedule.provenance
        assert found['package'].startswith('hba-fastai ') and found['train_items']==60 and found['augmentation']==[] and 'resumed' not in found
        assert found['model'] and found['classes']==10

def test_copies_draw_on_the_device_of_their_learner():
    "Also where the Learner itself is in another process, or was given up"
    pop = population(n=2, processes=2)
    pop.make_members(('fit',(1,),{}))
    assert all(m.learn is None and m.device==DLS.device for m in pop.members)

def test_members_of_different_architecture():
    sizes = iter((10,10,12,10))
    with pytest.raises(ValueError, match='Members 0 and 2 differ in shape of `8.weight`, .10, 16. and .12, 16.'):
        fit(population(make=lambda: learner(n=next(sizes))))

def test_members_that_share_a_part():
    body = nn.Conv2d(3,8,3)
    make = lambda: Learner(DLS, nn.Sequential(body, nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10)))
    with pytest.raises(ValueError, match='the same Parameter twice'): fit(population(make=make))

def of_another(i, layer):
    net = small_net()
    net[i] = layer
    return Learner(DLS, net)

ODD = { # what the second member has, and what is named
    'images of validation': (lambda: Learner(digits_dls(60, 40, bs=20, size=8, seed=1), small_net()), 'validation data, 40 items with digest'),
    'loss': (lambda: Learner(DLS, small_net(), loss_func=LabelSmoothingCrossEntropyFlat()), 'loss, CrossEntropyLossFlat.* and LabelSmoothingCrossEntropyFlat'),
    'number of the loss': (lambda: Learner(DLS, small_net(), loss_func=CrossEntropyLossFlat(label_smoothing=0.3)), 'loss, .*=0.0.* and .*=0.3'),
    'activation': (lambda: of_another(2, nn.Tanh()), r'layer `2`, ReLU\(\) and Tanh\(\)'),
    'optimizer': (lambda: Learner(DLS, small_net(), opt_func=SGD), 'optimizer, '),
    'weight decay': (lambda: Learner(DLS, small_net(), wd=0.3), 'weight decay, None and 0.3'),
    'batch': (lambda: Learner(digits_dls(60, 40, bs=10, size=8), small_net()), 'batch size, 20 and 10'),
    'rate': (lambda: Learner(DLS, small_net(), lr=0.1), 'learning rate, 0.001 and 0.1'),
    'metrics': (lambda: Learner(DLS, small_net(), metrics=accuracy), r'metrics, \[\] and .*accuracy'),
    'training data': (lambda: Learner(digits_dls(50, 40, bs=20, size=8), small_net()), 'train items, 60 and 50')}

@pytest.mark.parametrize('what', ODD)
def test_members_that_cannot_be_compared(what, tmp_path):
    "Named before anything trains; and so is what is not as it was, where a finished population goes on"
    odd,says = ODD[what]
    given = iter((learner,odd))
    pop = population(n=2, make=lambda: next(given)())
    with pytest.raises(ValueError, match=f'Members 0 and 1 differ in {says}'): fit(pop)
    fit(population(n=2, checkpoint=tmp_path/'pop'), 1)
    with pytest.raises(ValueError, match='was made with learner='): fit(population(n=2, make=odd, checkpoint=tmp_path/'pop', resume=True), 1)

@pytest.mark.parametrize('cb,says', [(SaveModelCallback,'members would write one file'), (CSVLogger,'members would write one file'),
                                     (EarlyStoppingCallback,'a member ends with the others'), (ScheduleCallback,'a population brings its own')])
def test_callbacks_that_a_member_cannot_have(cb, says):
    make = lambda: learner(*[cb(population_schedule()) if cb is ScheduleCallback else cb()])
    with pytest.raises(ValueError, match=f'has {cb.__name__} and {says}'): fit(population(make=make))

def population_schedule(): return Schedule([0.], PBASpace().values(PBASpace().start().double())[None])

def test_a_rate_that_falls_by_the_losses_falls_as_in_one_fit():
    "Each step of a member is a fit that goes on, and callbacks that compare epochs see those before; λ does not move at share=0"
    pop = population(make=lambda: learner(ReduceLROnPlateau(monitor='valid_loss', comp=np.greater, factor=2)), n=2, share=0)
    pop.fit(4, 1e-2)
    lrs = [[h['lr'] for h in m.read()['training']['opt']['hypers']][-1] for m in pop.members]
    losses = pop.frame().pivot(index='epoch', columns='member', values='valid_loss').values
    for i,lr in enumerate(lrs): # the file of the last epoch is written before the callback looks at that epoch
        falls = sum(losses[e,i]<=losses[:e,i].max() for e in range(1, 3))
        assert lr==pytest.approx(1e-2/2**falls)
    assert min(lrs)<1e-2

def test_callbacks_are_those_of_all_members():
    given = iter(([],[Callback()]))
    pop = population(n=2, make=lambda: learner(*next(given)))
    with pytest.raises(ValueError, match=r'Members 0 and 1 differ in callbacks, .*Watch.* and .*Callback'): fit(pop)

@pytest.mark.parametrize('what', ['missing','of another'])
def test_files_of_members_are_looked_at_before_it_goes_on(what, tmp_path):
    "Without its file a member would train from the beginning, alone"
    Cut.count = 0
    with pytest.raises(PowerCut): fit(population(make=lambda: learner(Cut(14, cut)), n=2, checkpoint=tmp_path/'pop'))
    f,other = (tmp_path/'pop'/f'member_{i}.pth' for i in (1,0))
    if what=='missing': f.unlink()
    else: f.write_bytes(other.read_bytes())
    says = 'member_1.pth is missing' if what=='missing' else 'member_1.pth is that of member 0'
    with pytest.raises(ValueError, match=says): fit(population(n=2, checkpoint=tmp_path/'pop', resume=True))
    (tmp_path/'pop/population.pth').unlink()
    with pytest.raises(ValueError, match='holds member_0.pth of a population already'): fit(population(n=2, checkpoint=tmp_path/'pop', resume=True))

def test_the_record_of_the_winner_is_there_again(tmp_path):
    a = fit(population(n=2, checkpoint=tmp_path/'pop'))
    b = fit(population(n=2, checkpoint=tmp_path/'pop', resume=True))
    there,here = a.best.recorder,b.best.recorder
    assert [list(o) for o in here.values]==[list(o) for o in there.values] and here.metric_names==there.metric_names
    assert (here.iters,here.lrs)==(there.iters,there.lrs) and torch.equal(torch.stack(here.losses), torch.stack(there.losses))

def test_a_callback_that_ends_a_fit_early_is_named():
    class Ends(Callback):
        def before_batch(self):
            if self.learn.epoch==1: raise CancelFitException
    pop = population(make=lambda: learner(Ends()), every=2)
    with pytest.raises(RuntimeError, match='Member 0 ended behind epoch 1 and should train to epoch 2'): fit(pop)

def test_a_folder_that_holds_a_population_is_left_alone(tmp_path):
    a = fit(population(n=2, checkpoint=tmp_path/'pop'), 1)
    with pytest.raises(ValueError, match='holds population.pth of a population already: go on with it by `resume=True`'):
        fit(population(n=2, checkpoint=tmp_path/'pop'), 1)
    assert fit(population(n=2, checkpoint=tmp_path/'pop', resume=True), 1).rounds==a.rounds
    a.members[a.winner].file.unlink()
    with pytest.raises(ValueError, match='member_..pth is missing'):
        fit(population(n=2, checkpoint=tmp_path/'pop', resume=True), 1).best

@pytest.mark.parametrize('kw,says', [(dict(cbs=[]),'cbs is not for a population'), (dict(momentum=3),'unexpected keyword')])
def test_arguments_of_the_fit(kw, says):
    with pytest.raises(TypeError, match=says): population().fit(2, **kw)

def test_a_member_that_diverges_is_replaced_and_all_are_an_error():
    class Nan(Callback):
        def __init__(self, i): self.i = i
        def after_pred(self):
            if self.i: self.learn.pred = self.learn.pred*float('nan')
    which = iter((0,1,0,0))
    pop = fit(population(make=lambda: learner(Nan(next(which)))), 2)
    assert pop.rounds[0]['donors'][1] not in (None,1)
    with pytest.raises(FloatingPointError, match='No member has a finite validation loss behind epoch 1'): fit(population(make=lambda: learner(Nan(1))), 1)

@pytest.mark.parametrize('processes', [1,pytest.param(2, marks=pytest.mark.slow)])
def test_a_student_whose_hypergradients_are_not_finite_is_replaced(processes):
    "It counts as the worst, and its copy goes on; all the others are as they would be"
    def make(): # in a process of its own it is made again
        class Worse(Callback):
            order = 16
            def before_train(self):
                if self.learn.student.role.i==1 and self.learn.epoch==1:
                    plain = self.learn.student.target_loss
                    self.learn.student.target_loss = lambda b: plain(b)*float('nan')
        return learner(Worse())
    said = []
    pop = population('hpm', make, n=3, share=0.3, warmup=0., processes=processes)
    pop.logger = said.append
    fit(pop, 3)
    assert pop.rounds[1]['losses'][1]==float('inf') and pop.rounds[1]['donors'][1] not in (None,1)
    assert any(o.startswith('member 1 diverged: ') and 'hypergradients of this epoch were not finite' in o for o in said)
    assert all(torch.isfinite(torch.tensor(pop.rounds[2]['losses']))) and len(pop.frame())==9 and pop.schedule.progress[-1]==1

@pytest.mark.slow
def test_processes_give_the_same_and_one_that_is_killed_is_started_again(tmp_path, monkeypatch):
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    here = fit(population(n=2), 2)
    def make():
        flag = tmp_path/'killed'
        def die():
            if flag.exists(): return
            flag.touch()
            kill()
        class Once(Callback):
            def before_batch(self):
                if self.training and self.learn.epoch==1 and 'SPAWNED' in os.environ: die()
        return learner(Once())
    monkeypatch.setenv('SPAWNED', '1')
    there = fit(population(make=make, n=2, processes=2), 2)
    assert (tmp_path/'killed').exists() and here.rounds==there.rounds and all(map(same, end_of(here), end_of(there)))

@pytest.mark.parametrize('kind', ['pbt','hpm'])
def test_policies_in_layers_and_on_the_loss(kind):
    "The model says how many rates of dropout there are; members are compared by the plain loss"
    def make():
        learn = learner()
        learn.model.insert(len(learn.model)-1, torch.nn.Dropout(0.1))
        return learn
    pop = fit(population(kind, make, policy=PBAPolicy()+Dropout()+LabelSmoothing()), 2)
    assert list(pop.schedule.spaces)==['PBAPolicy','Dropout','LabelSmoothing'] and len(pop.policies.space)==56
    with pop.best.no_bar(): loss = pop.best.validate()[0]
    assert loss==pytest.approx(pop.rounds[-1]['losses'][pop.winner], rel=1e-5)

class Judge(Callback):
    "Validates behind each epoch; fastai sets `learn.epoch` to 0 then"
    order = 80 # behind the Recorder, whose row it would change else
    def after_epoch(self):
        if not self.learn.lock.locked(): self.learn.validate()

@pytest.mark.parametrize('kind', ['pbt','hpm'])
def test_members_that_validate_within_their_fit(kind):
    whole,judged = (fit(population(kind, lambda: learner(*[cb() for cb in cbs]), n=2)) for cbs in ([],[Judge]))
    assert [r['donors'] for r in whole.rounds]==[r['donors'] for r in judged.rounds] and whole.schedule==judged.schedule
