"Stop and go on: the search continues as the uninterrupted one would have; a killed process leaves a file that loads; files are never executed"
import json,os,signal,subprocess,sys,time
from pathlib import Path
import numpy as np
import pandas as pd
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.progress import CSVLogger
from fastai.callback.tracker import EarlyStoppingCallback,ReduceLROnPlateau,SaveModelCallback
from fastai.optimizer import OptimWrapper,SGD
from fastai.vision.all import ImageDataLoaders,Resize
from functools import partial
from hypothesis import HealthCheck,given,settings,strategies as st
from jsonschema import Draft202012Validator,ValidationError
from conftest import small_learner,small_net
from hba_fastai.search import HBACallback,ScheduleCallback
from hba_fastai.data import digits_dls
from hba_fastai.checkpoint import CheckpointError,load_checkpoint,save_checkpoint
from hba_fastai.pba import PBAPolicy
from hba_fastai.schedule import Schedule,ScheduleError
from hba_fastai.smoothing import LabelSmoothing
from hba_fastai.space import PBASpace

class Stop(Callback):
    "Ends the fit as a killed process would, without a farewell, in the middle of an epoch"
    def __init__(self, epoch): self.at = epoch
    def before_batch(self):
        if self.training and self.learn.epoch==self.at and self.learn.iter==4: raise RuntimeError('power cut')

OPTS = dict(adam=None, sgd=partial(SGD, mom=0.9), torch=partial(OptimWrapper, opt=partial(torch.optim.SGD, momentum=0.9)))

@pytest.mark.parametrize('opt', OPTS)
@pytest.mark.parametrize('kw', [dict(), dict(condition='dose', valid=0.3), dict(centred=False, strategy='conv+bn', T_train=3),
                                dict(sparing=True, T_train=3)])
def test_resume_continues_bit_for_bit(kw, opt, tmp_path):
    cfg = dict(n_train=240, path=tmp_path, **({'opt_func': OPTS[opt]} if OPTS[opt] else {}))
    def search(learn, stop=None, **more):
        hba = HBACallback(seed=5, **kw, **more)
        learn.fit_one_cycle(4, 1e-2, cbs=[hba, *([Stop(stop)] if stop else [])])
        return hba
    whole = small_learner(**cfg)
    a = search(whole)
    half = small_learner(**cfg)
    with pytest.raises(RuntimeError, match='power cut'): search(half, stop=2, checkpoint='search')
    torch.rand(7); other = small_learner(seed=9, **cfg) # another process: other random states, another model
    b = search(other, checkpoint='search', resume=True)
    assert torch.equal(a.schedule.table, b.schedule.table) and torch.equal(a.schedule.progress, b.schedule.progress)
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, other.model.state_dict()[k]), k
    assert sorted(p.name for p in (tmp_path/'models').iterdir())==['search.pth']

def test_a_look_at_the_network_is_no_fit(pngs, tmp_path):
    "fastai's `tta` fires `before_fit` as a training does: it reads no checkpoint, and the search goes on afterwards"
    dls = ImageDataLoaders.from_folder(pngs, valid_pct=0.3, seed=0, bs=4, num_workers=0, item_tfms=Resize(12))
    new = lambda seed: small_learner(seed, dls, small_net(n=2), path=tmp_path, cbs=HBACallback(seed=0, checkpoint='s', resume=True))
    learn = new(0)
    with pytest.raises(RuntimeError, match='power cut'): learn.fit(4, cbs=Stop(2))
    for o in (learn,new(4)):
        before = [p.detach().clone() for p in o.model.parameters()]
        with o.no_bar(): o.tta(n=1)
        assert all(map(torch.equal, before, o.model.parameters()))
        o.fit(4)
        assert o.hba_schedule.provenance['epochs']==4 and o.hba_schedule.progress[-1]==1

def test_a_fit_that_is_refused_leaves_nothing(tmp_path):
    first,learn = (small_learner(path=tmp_path, cbs=HBACallback(checkpoint='s', resume=True)) for _ in range(2))
    names = [m.name for m in learn.metrics]
    first.fit(2)
    with pytest.raises(CheckpointError): learn.fit(3)
    assert [m.name for m in learn.metrics]==names and '_with_events' not in vars(learn)

def test_resume_without_a_file_starts_anew_and_a_finished_fit_stays_finished(tmp_path):
    learn,hba = small_learner(path=tmp_path),HBACallback(checkpoint='s', resume=True)
    learn.fit(2, cbs=hba)
    again,hba2 = small_learner(seed=4, path=tmp_path),HBACallback(checkpoint='s', resume=True)
    again.fit(2, cbs=hba2)
    assert torch.equal(again.hba_schedule.table, hba.schedule.table)
    assert all(torch.equal(u,v) for u,v in zip(learn.model.state_dict().values(), again.model.state_dict().values()))

def test_resume_in_a_process_with_another_seed_holds_the_same_items_out(tmp_path):
    "Without a seed of its own a search takes torch's; the checkpoint brings it along"
    held = []
    class Held(HBACallback):
        name = 'hba'
        def attach(self): super().attach(); held.append(sorted(self.learn.dls.train.get_idxs()))
    def fit(seed, *stop):
        learn = small_learner(path=tmp_path); torch.manual_seed(seed)
        learn.fit(2, cbs=[Held(checkpoint='s', valid=0.3, resume=True), *stop])
    with pytest.raises(RuntimeError, match='power cut'): fit(1, Stop(1))
    fit(2)
    assert len(held)==2 and held[0]==held[1]

def test_callbacks_that_compare_epochs_see_those_before_the_stop(tmp_path):
    "The best model stays, patience runs on, the rate falls as often, and the table is whole: fastai's own fail where epochs are left out"
    def search(name, *more, **kwargs):
        learn,worse = small_learner(path=tmp_path/name, opt_func=SGD),dict(monitor='valid_loss', comp=np.greater) # than ever: it seldom is
        watch = [SaveModelCallback(),ReduceLROnPlateau(**worse, factor=2),EarlyStoppingCallback(**worse, patience=4)]
        hba = HBACallback(checkpoint='search', seed=1, warmup=0., valid=0.3, **kwargs)
        learn.fit(8, 0.01, cbs=[hba,*watch,*more])
        return learn,hba.schedule,[(cb.best,getattr(cb, 'wait', None)) for cb in watch],learn.opt.hypers[-1]['lr']
    class Written(Callback):
        "When was the best model written?"
        order,times = 80,{}
        def after_epoch(self): self.times[self.learn.epoch] = (tmp_path/'half/models/model.pth').stat().st_mtime_ns
    whole,*a = search('whole', CSVLogger())
    with pytest.raises(RuntimeError, match='power cut'): search('half', Stop(3))
    before = (tmp_path/'half/models/model.pth').stat().st_mtime_ns
    again,*b = search('half', Written(), CSVLogger(), resume=True)
    there,here = (pd.read_csv(tmp_path/name/'history.csv') for name in ('whole','half'))
    assert a==b and a[2]<0.01 and len(there)<8 # its rate fell, and it stopped early
    assert [Written.times[e]==before for e in range(4)]==[True,True,True,False] and 'save' not in vars(again)
    assert list(here.epoch)==list(there.epoch)
    for k in ('train_loss','valid_loss','hyper_loss','mean_p','leading'): assert here[k].equals(there[k])
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k

def test_an_error_among_epochs_that_are_left_out(tmp_path):
    "It comes before `ShownAgain` has given `learn.save` back"
    class Fails(Callback):
        order = 60
        def after_epoch(self): raise OSError('no space left')
    with pytest.raises(RuntimeError, match='power cut'): small_learner(path=tmp_path).fine_tune(2, 1e-2, cbs=[HBACallback(checkpoint='s', seed=1),Stop(1)])
    learn = small_learner(path=tmp_path)
    with pytest.raises(OSError, match='no space left'): learn.fine_tune(2, 1e-2, cbs=[HBACallback(checkpoint='s', seed=1, resume=True),Fails()])
    assert 'save' not in vars(learn)

@pytest.mark.parametrize('at', [0,1,2])
def test_a_fine_tune_that_was_stopped_in_either_fit_goes_on(at, tmp_path):
    "The first fit is left out where the second has begun; and what fastai records of the batches is whole"
    def search(name, *more, **kwargs):
        learn,hba = small_learner(path=tmp_path/name),HBACallback(checkpoint='search', seed=1, warmup=0.2, **kwargs)
        learn.fine_tune(3, 1e-2, freeze_epochs=1, cbs=[hba,*more])
        return learn,hba
    whole,a = search('whole')
    class StopAt(Stop):
        seen = 0
        def before_batch(self):
            if self.training: self.seen += 1
            if self.seen==[5,13,26][at]: raise RuntimeError('power cut')
    with pytest.raises(RuntimeError, match='power cut'): search('half', StopAt(0))
    again,b = search('half', resume=True)
    assert a.schedule==b.schedule
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, again.model.state_dict()[k]), k
    there,here = whole.recorder,again.recorder
    assert [[str(v) for v in o] for o in here.values]==[[str(v) for v in o] for o in there.values]
    assert here.lrs==there.lrs and here.iters==there.iters and torch.equal(torch.stack(list(here.losses)), torch.stack(list(there.losses)))

OTHER = { # how the fit that goes on differs: changes of the Learner, of the fit, of the search; and what is named
    'epochs': ({}, dict(n=3), {}, 'epochs=2 and this search has 3'), 'T_train': ({}, {}, dict(T_train=3), 'T_train=4 and this search has 3'),
    'moves': ({}, {}, dict(moves=3), 'moves=2 and this search has 3'), 'share': ({}, {}, dict(share=0.3), 'share=1.0 and this search has 0.3'),
    'layers': ({}, {}, dict(strategy='bn'), "strategy='auto' and this search has 'bn'"),
    'model': (dict(model=small_net(n=12)), {}, {}, 'of another model .* 8.weight has shape .10, 16. there and .12, 16. here'),
    'data': (dict(n_train=220), {}, {}, 'train_items=200 and this search has 220'),
    'batch': (dict(dls=digits_dls(200, 100, bs=10, size=12)), {}, {}, 'batch_size=20 and this search has 10'),
    'optimizer': (dict(opt_func=SGD), {}, {}, 'optimizer='), 'weight decay': (dict(wd=0.3), {}, {}, 'optimizer='),
    'rate': ({}, dict(lr=1e-2), {}, 'learning_rates='),
    'course of the rate': ({}, dict(one_cycle=True), {}, 'learning_rates='), 'hlr': ({}, {}, dict(hlr=0.05), 'hlr=None and this search has 0.05'),
    'valid': ({}, {}, dict(valid=0.3), 'target='), 'seed': ({}, {}, dict(seed=7), 'seed='), 'start': ({}, {}, dict(start=0.1), 'start='),
    'warm-up': ({}, {}, dict(warmup=0.2), 'warmup=0.3 and this search has 0.2'),
    'skip': ({}, {}, dict(skip=['Invert']), 'skip='), 'limits': ({}, {}, dict(limits={'Rotate': (0,9)}), 'limits=')}

@pytest.mark.parametrize('what', OTHER)
def test_another_fit_is_refused(what, tmp_path):
    "Before anything of the Learner is touched, in a sentence that names what differs"
    of_learner,of_fit,of_search,match = OTHER[what]
    with pytest.raises(RuntimeError, match='power cut'): small_learner(path=tmp_path).fit(2, cbs=[HBACallback(checkpoint='s', seed=5), Stop(1)])
    learn = small_learner(path=tmp_path, **of_learner)
    before = [p.clone() for p in learn.model.parameters()]
    fit = learn.fit_one_cycle if of_fit.pop('one_cycle', False) else learn.fit
    with pytest.raises(CheckpointError, match=match):
        fit(of_fit.pop('n', 2), *of_fit.values(), cbs=HBACallback(checkpoint='s', resume=True, **{'seed': 5, **of_search}))
    assert all('forward' not in vars(m) for m in learn.model.modules()) and all(torch.equal(p, q) for p,q in zip(before, learn.model.parameters()))
    learn.fit(1)

def test_a_finished_search_still_reports(tmp_path, capsys):
    small_learner(path=tmp_path).fit(3, cbs=(hba:=HBACallback(checkpoint='s.pth')))
    hba2 = HBACallback(checkpoint='s.pth', resume=True)
    small_learner(path=tmp_path).fit(3, cbs=hba2)
    assert hba.report().equals(hba2.report()) and sorted(o.name for o in (tmp_path/'models').iterdir())==['s.pth']

def test_the_same_object_goes_on_where_it_was_stopped(tmp_path):
    "As a cell of a notebook that is run again: the epochs that are done are left out, not added"
    whole,other = HBACallback(seed=5),HBACallback(seed=5, checkpoint='s', resume=True)
    small_learner().fit(4, 1e-2, cbs=whole)
    learn = small_learner(path=tmp_path)
    with pytest.raises(RuntimeError, match='power cut'): learn.fit(4, 1e-2, cbs=[other, Stop(2)])
    learn.fit(4, 1e-2, cbs=other)
    assert other.schedule==whole.schedule

def test_a_finished_search_can_be_fitted_on(tmp_path):
    small_learner(path=tmp_path).fit(2, cbs=HBACallback(checkpoint='s'))
    learn,hba = small_learner(path=tmp_path),HBACallback(checkpoint='s', resume=True)
    learn.fit(2, cbs=hba)
    with pytest.warns(UserWarning, match='goes on from the last fit'): learn.fit(2, cbs=hba)
    assert hba.schedule.progress.tolist()==pytest.approx([0,0.15,0.25,0.5,0.75,1])

def test_a_seed_may_be_left_out_later(tmp_path):
    "The checkpoint has it; another one is refused"
    for i,seed in enumerate((5,5,None)):
        with pytest.raises(RuntimeError, match='power cut'):
            small_learner(path=tmp_path).fit(4, cbs=[HBACallback(seed=seed, checkpoint='s', resume=True), Stop(i+1)])
    with pytest.raises(CheckpointError, match='seed=5 and this search has 6'):
        small_learner(path=tmp_path).fit(4, cbs=HBACallback(seed=6, checkpoint='s', resume=True))

def test_a_checkpoint_needs_a_name():
    with pytest.raises(CheckpointError, match='must be the name of a file'): HBACallback(checkpoint=True)

def test_what_may_differ_is_recorded(tmp_path):
    with pytest.raises(RuntimeError): small_learner(path=tmp_path).fit(2, cbs=[HBACallback(checkpoint='s'), Stop(1)])
    small_learner(path=tmp_path).fit(2, cbs=(hba:=HBACallback(checkpoint='s', resume=True)))
    assert len(hba.schedule.provenance['resumed'])==1 and f'torch {torch.__version__}' in hba.schedule.provenance['resumed'][0]

def test_sigkill_at_any_moment_leaves_a_file_that_loads(tmp_path):
    code = f"""import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})
import warnings; warnings.simplefilter('ignore')
from pathlib import Path
from conftest import small_learner
from hba_fastai.search import HBACallback
l = small_learner(path=Path({str(tmp_path)!r}), n_train=40, n_valid=40)
l.fit(10_000, cbs=HBACallback(checkpoint='s'))"""
    p = subprocess.Popen([sys.executable,'-c',code])
    f,loads = tmp_path/'models'/'s.pth',0
    try:
        while not f.exists() and p.poll() is None: time.sleep(0.1)
        for _ in range(150): # whenever one looks, the file is whole
            load_checkpoint(f); loads += 1
    finally: p.send_signal(signal.SIGKILL); p.wait()
    assert loads==150 and load_checkpoint(f)['epoch']>=1

@pytest.fixture(scope='module')
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp('fuzz')
    learn = small_learner(path=d, n_train=40, n_valid=40)
    learn.fit(2, cbs=HBACallback(checkpoint='c'))
    learn.hba_schedule.save(d/'s.json')
    return (d/'models'/'c.pth').read_bytes(),(d/'s.json').read_bytes(),d

SCHEMA = Draft202012Validator(json.loads((Path(__file__).parents[1]/'tools'/'schedule.schema.json').read_text('utf8')))

edits = st.lists(st.tuples(st.sampled_from(['flip','cut','insert','copy','zero']), st.floats(0,1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4)

def mutate(data, edits):
    for what,at,b in edits:
        i = int(at*(len(data)-1)) if data else 0
        if what=='flip' and data: data = data[:i]+bytes([data[i]^(b[0] or 1)])+data[i+1:]
        elif what=='cut': data = data[:i]
        elif what=='insert': data = data[:i]+b+data[i:]
        elif what=='copy': data = data[:i]+data[i//2:i]+data[i:]
        elif what=='zero': data = data[:i]+bytes(len(b))+data[i+len(b):]
    return data

fuzz = partial(settings, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))

@fuzz(max_examples=1000) # 10,000 of each: benchmarks/soak.py
@given(edits)
def test_fuzzed_checkpoints_give_our_error(files, e):
    data = mutate(files[0], e)
    (files[2]/'m.pth').write_bytes(data)
    if data==files[0]: return
    with pytest.raises(CheckpointError): load_checkpoint(files[2]/'m.pth')

@fuzz(max_examples=1000) # 10,000 of each: benchmarks/soak.py
@given(edits)
def test_fuzzed_schedules_give_our_error_or_a_sound_schedule(files, e):
    (files[2]/'m.json').write_bytes(mutate(files[1], e))
    try: s = Schedule.load(files[2]/'m.json')
    except ScheduleError: return
    v = PBASpace().lam(s.table) # a digit that became another digit: still within its range
    assert v.isfinite().all() and s.table.shape[1]==54 and ScheduleCallback(s)
    SCHEMA.validate(json.loads((files[2]/'m.json').read_bytes())) # what is published says what is read

@pytest.mark.parametrize('where,what', [(('values','Rotate_0.m',0),1e300), (('progress',0),-1), (('version',),4), (('sigma',),'1'), (('space','skip'),[7])])
def test_the_published_form_refuses_what_is_refused(files, where, what, tmp_path):
    d = json.loads(files[1])
    SCHEMA.validate(d)
    *path,last = where
    o = d
    for k in path: o = o[k]
    o[last] = what
    with pytest.raises(ValidationError): SCHEMA.validate(d)
    (tmp_path/'s.json').write_text(json.dumps(d))
    with pytest.raises(ScheduleError): Schedule.load(tmp_path/'s.json')

def test_the_published_form_has_spaces_and_limits(tmp_path):
    learn,hba = small_learner(n_train=40, n_valid=40),HBACallback(policy=PBAPolicy(limits={'Rotate': (0,10)})+LabelSmoothing())
    learn.fit(2, cbs=hba)
    SCHEMA.validate(json.loads(hba.schedule.save(tmp_path/'s.json').read_text()))

def test_nothing_is_executed(tmp_path):
    "A pickle that would run code, in a file with a right digest, is refused by `weights_only`"
    class Evil:
        def __reduce__(self): return os.mkdir,(str(tmp_path/'owned'),)
    save_checkpoint(tmp_path/'e.pth', {'same': Evil()})
    with pytest.raises(CheckpointError, match='more than tensors'): load_checkpoint(tmp_path/'e.pth')
    assert not (tmp_path/'owned').exists()

@pytest.mark.parametrize('again', [False,True])
def test_the_cell_of_the_learner_is_run_again(again, tmp_path):
    "With the same callback, or a new one"
    def hba(): return HBACallback(seed=5, checkpoint='s', resume=True)
    whole = HBACallback(seed=5)
    small_learner().fit(4, 1e-2, cbs=whole)
    first = hba()
    with pytest.raises(RuntimeError, match='power cut'): small_learner(path=tmp_path).fit(4, 1e-2, cbs=[first,Stop(3)])
    second = first if again else hba()
    small_learner(seed=3, path=tmp_path).fit(4, 1e-2, cbs=second)
    assert second.schedule==whole.schedule and len(second.lam.series)==len(whole.lam.series)

def test_what_a_table_and_an_arch_can_be(tmp_path):
    "A metric that gives an array; an architecture that is a `partial`; the record of callbacks that draw"
    def each(pred, targ): return np.array([0.1,0.2])
    def make():
        learn = small_learner(path=tmp_path)
        learn.metrics = [each]
        learn.arch = partial(small_net, c=3)
        return learn
    with pytest.raises(RuntimeError, match='power cut'): make().fit(3, cbs=[HBACallback(seed=0, checkpoint='s'),Stop(2)])
    class Graph(Callback):
        name,order = 'show_graph',65
        def before_fit(self): self.nb_batches = []
        def after_train(self): self.nb_batches.append(self.train_iter)
    learn = make()
    learn.fit(3, cbs=[HBACallback(seed=0, checkpoint='s', resume=True),Graph()])
    assert len(learn.recorder.values)==3 and '0.1' in learn.recorder.values[0][2]
    whole = make()
    graph = Graph()
    whole.fit(3, cbs=[HBACallback(seed=0),graph])
    assert learn.train_iter==whole.train_iter==30 and graph.nb_batches==[10,20,30]
