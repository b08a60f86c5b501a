"""A fit that does not end well leaves nothing behind: interrupted at any line of ours while the search is put in place, at any event,
by Ctrl-C or a foreign error, with the callback given to `fit` or kept in the Learner"""
import subprocess,sys
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback,event
from fastai.optimizer import OptimWrapper,SGD,ranger
from fastai.torch_core import set_seed
from fastai.vision.data import ImageDataLoaders
from PIL import Image
from conftest import small_learner,small_net
import hba_fastai
from hba_fastai.search import HBACallback,ScheduleCallback
from hba_fastai.data import digits
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace

OURS = str(Path(hba_fastai.__file__).parent)
start_schedule = lambda: Schedule([0.], PBASpace().values(PBASpace().start(0.05))[None])

def fingerprint(learn) -> dict:
    "All that a search or a replay swaps, by identity where it is an object"
    opt,inner = learn.opt,getattr(learn.opt, 'opt', learn.opt)
    ids = lambda l: [id(o) for o in l]
    names = lambda dl: sorted(set(vars(dl))-{'_n_inp','_types'}) # fastai caches those itself
    pipes = lambda dl: {k: ids(getattr(dl, k).fs) for k in ('after_item','before_batch','after_batch')}
    return dict(keys=list(learn.model.state_dict()), modules=[(n,type(m),sorted(vars(m))) for n,m in learn.model.named_modules()],
                trained=[p.requires_grad for p in learn.model.parameters()], groups=[ids(g) for g in opt.param_lists],
                opt=(sorted(vars(opt)),sorted(vars(inner))),
                states=sorted((id(p),sorted(s)) for p,s in inner.state.items()), loaders=[(names(dl),dl.n,pipes(dl)) for dl in learn.dls.loaders],
                metrics=ids(learn.metrics), cbs=ids(learn.cbs),
                learner=sorted(k for k in vars(learn) if k not in ('smooth_loss','final_record','loss_grad','x','y','iter')))

def assert_plain(learn, before, kept=False):
    after = fingerprint(learn)
    for k in before:
        if not (kept and k in ('cbs','learner')): assert before[k]==after[k], k

class Interrupt(Callback):
    "Raises at the first line of the package, from its own `before_fit` to the first batch, that is not among `done`, and adds it"
    order,ours = 14,OURS # just before the search; beginnings of the names of files
    def __init__(self, done): self.done,self.at = done,None
    def trace(self, frame, event, arg):
        if not frame.f_code.co_filename.startswith(self.ours): return None
        at = f'{Path(frame.f_code.co_filename).name}:{frame.f_lineno}'
        if event=='line' and at not in self.done:
            sys.settrace(None)
            self.done.add(at)
            self.at = at
            raise KeyboardInterrupt('test')
        return self.trace
    def before_fit(self): sys.settrace(self.trace)
    def before_train(self): sys.settrace(self.trace)
    def before_batch(self): sys.settrace(None)

KINDS = {'search': HBACallback, 'un-centred, many layers, hold-out': lambda: HBACallback(centred=False, strategy='conv+bn', valid=0.3),
         'sparing': lambda: HBACallback(sparing=True), 'replay': lambda: ScheduleCallback(start_schedule())}
MANY = pytest.param('un-centred, many layers, hold-out', False, marks=pytest.mark.slow)

@pytest.mark.filterwarnings('ignore:.*has no image of', 'ignore:.*too short for a hyper-step')
@pytest.mark.parametrize('kind,kept', [('search',True), MANY, ('replay',False), ('replay',True)])
def test_interrupted_at_any_line_while_it_is_put_in_place(kind, kept):
    learn,done = small_learner(n_train=40, n_valid=20),set()
    learn.fit(1) # the optimizer has its states
    before = fingerprint(learn)
    while True:
        cb,stop = KINDS[kind](),Interrupt(done)
        if kept: learn.add_cb(cb)
        try: learn.fit(1, cbs=[stop] if kept else [cb,stop])
        except KeyboardInterrupt: pass
        finally: sys.settrace(None)
        if kept:
            learn.validate() # what is left, if before the first epoch, goes at the next opportunity
            learn.remove_cb(cb)
        try: assert_plain(learn, before)
        except AssertionError as e: raise AssertionError(f'interrupted at {stop.at}: {e}') from None
        if stop.at is None: break # it ran through
    assert len(done)>(60 if kind=='replay' else 200), 'the interruption reached few lines'

class Boom(Callback):
    "Raises at the n-th time of an event"
    def __init__(self, event, what, order, times=1): self.event,self.what,self.order,self.n = event,what,order,times
    def __call__(self, event):
        if event==self.event:
            self.n -= 1
            if self.n==0: raise self.what

EVENTS = [e for e in vars(event) if not e.startswith('_') and 'cancel' not in e and e!='after_create']

@pytest.mark.parametrize('what', [KeyboardInterrupt('test'),RuntimeError('CUDA out of memory')], ids=['ctrl-c','error'])
@pytest.mark.parametrize('order', [5,40,70]) # before the search, behind it, behind all
@pytest.mark.parametrize('kind', KINDS)
def test_interrupted_at_any_event(kind, order, what):
    learn = small_learner(n_train=120, n_valid=40)
    learn.fit(1)
    before = fingerprint(learn)
    for kept in (False,True):
        for e in EVENTS:
            for times in (1,) if e.endswith('_fit') else (1,2) if e.endswith(('epoch','train','validate')) else (1,5):
                cb = KINDS[kind]()
                if kept: learn.add_cb(cb)
                with pytest.raises(type(what)): learn.fit(2, cbs=[Boom(e, what, order, times), *([] if kept else [cb])])
                if kept:
                    if e.endswith('_fit'): learn.validate()
                    assert_plain(learn, before, kept=True) # at once, while the Learner still has it
                    learn.remove_cb(cb)
                assert_plain(learn, before)

@pytest.mark.parametrize('kind', KINDS)
def test_a_plain_fit_afterwards_never_saw_it(kind, tmp_path):
    "Kept in the Learner, stopped by Ctrl-C, taken out: the next fit equals one of a Learner that never had it; its export loads where the package is missing"
    cb = KINDS[kind]()
    learn = small_learner(cbs=cb)
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Boom('after_batch', KeyboardInterrupt('test'), 40, 15))
    learn.remove_cb(cb)
    learn.save(tmp_path/'s', with_opt=True)
    other = small_learner()
    other.load(tmp_path/'s', with_opt=True)
    for l in (learn,other):
        l.dls.train.rng.seed(7)
        set_seed(7)
        l.fit(2)
    for (k,a),b in zip(learn.model.state_dict().items(), other.model.state_dict().values()): assert torch.equal(a, b), k

@pytest.mark.parametrize('kind', KINDS)
def test_its_export_loads_where_the_package_is_missing(kind, tmp_path):
    x,y = digits(16)
    for i in range(60):
        d = tmp_path/'im'/str(y[i].item()%2); d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i].permute(1,2,0).numpy()).save(d/f'{i}.png')
    cb,dls = KINDS[kind](),ImageDataLoaders.from_folder(tmp_path/'im', valid_pct=0.3, seed=1, bs=8, num_workers=0)
    learn = small_learner(dls=dls, model=small_net(n=2), cbs=cb)
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Boom('after_batch', KeyboardInterrupt('test'), 40, 3))
    learn.logger = print # a function of this test module would need it too
    learn.export(tmp_path/'kept.pkl')
    learn.remove_cb(cb)
    learn.export(tmp_path/'e.pkl')
    code = ("import sys,warnings; warnings.simplefilter('ignore'); sys.modules['hba_fastai'] = None; "
        f"from fastai.vision.all import load_learner; print(len(load_learner({str(tmp_path/'e.pkl')!r}).dls.vocab))")
    r = subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, cwd=tmp_path)
    assert r.stdout.strip().endswith('2'), r.stderr[-2000:]

def test_kept_and_stopped_it_can_go_on_and_be_exported(tmp_path):
    learn = small_learner(cbs=HBACallback())
    learn.logger = print
    with pytest.raises(KeyboardInterrupt): learn.fit(2, cbs=Boom('after_batch', KeyboardInterrupt('test'), 40, 15))
    assert len(learn.hba_schedule)>1
    learn.export(tmp_path/'e.pkl')
    learn.fit(1)

def test_the_same_object_on_a_model_of_other_widths():
    hba,learn = HBACallback(seed=0),small_learner()
    learn.fit(2, cbs=hba)
    first,other = hba.schedule,small_learner(model=torch.nn.Sequential(torch.nn.Conv2d(3,5,3), torch.nn.BatchNorm2d(5),
        torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(5,10)))
    with pytest.warns(UserWarning, match='a new search begins'): other.fit(2, cbs=hba)
    assert hba.schedule is other.hba_schedule and learn.hba_schedule is first and hba.schedule.progress.tolist()==[0,0.3,0.5,1]

@pytest.mark.parametrize('pair', [(HBACallback,HBACallback), (HBACallback,lambda: ScheduleCallback(start_schedule())),
                                  (lambda: ScheduleCallback(start_schedule()),)*2])
@pytest.mark.parametrize('kept', [False,True])
def test_twice_the_augmentation_is_refused(pair, kept):
    learn = small_learner()
    learn.fit(1)
    before,(a,b) = fingerprint(learn),(p() for p in pair)
    if kept: learn.add_cb(a)
    with pytest.raises(ValueError, match='would both augment each image'): learn.fit(1, cbs=[b] if kept else [a,b])
    if kept: learn.remove_cb(a)
    assert_plain(learn, before)

@pytest.mark.parametrize('opt_func', [SGD, lambda p,lr: OptimWrapper(p, torch.optim.AdamW, lr=lr)])
def test_optimizers_of_both_kinds(opt_func):
    learn = small_learner(opt_func=opt_func)
    learn.fit(1)
    before = fingerprint(learn)
    with pytest.raises(RuntimeError): learn.fit(2, cbs=[HBACallback(), Boom('after_loss', RuntimeError('foreign'), 40, 12)])
    assert_plain(learn, before)

def test_lookahead_is_plain_again():
    "fastai's ranger keeps slow weights beside each parameter"
    def slow(learn): return [len(o) for o in learn.opt.slow_weights]
    learn = small_learner(opt_func=ranger)
    learn.fit(1, 1e-3)
    n = slow(learn)
    class See(Callback):
        order,within = 60,None
        def after_train(self): See.within = slow(self.learn)
    learn.fit(1, 1e-3, cbs=[HBACallback(),See()], reset_opt=False)
    assert slow(learn)==n==[len(g) for g in learn.opt.param_lists] and sum(See.within)==sum(n)+4
