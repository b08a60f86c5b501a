"What a long night brings: a full disk, a folder that may not be written, two searches with one file, a clock that jumps, a GPU that is full"
import os,resource,tempfile,time
from contextlib import contextmanager
from pathlib import Path
import pytest, torch
import torch.nn.functional as F
from fastai.callback.core import Callback
from conftest import small_learner
from test_undo import assert_plain,fingerprint
from hba_fastai.checkpoint import CheckpointError,load_checkpoint
from hba_fastai.pba import PBAPolicy
from hba_fastai.schedule import Schedule
from hba_fastai.search import HBACallback,ScheduleCallback
from hba_fastai.session import run

class At(Callback):
    "Does something at the end of an epoch, before the search writes its checkpoint"
    order = -1
    def __init__(self, epoch, do): self.at,self.do = epoch,do
    def after_epoch(self):
        if self.epoch==self.at: self.do()

@contextmanager
def limited(size):
    "No file can grow beyond `size` bytes, as on a disk that is full"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size,before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)

@contextmanager
def stranger(folder):
    "Someone who may read `folder` and not write into it"
    folder.chmod(0o555)
    root = os.geteuid()==0
    if root: os.seteuid(65534)
    try: yield
    finally:
        if root: os.seteuid(0)
        folder.chmod(0o755)

def test_a_full_disk_costs_the_checkpoint_that_had_no_room(tmp_path):
    learn,hba = small_learner(path=tmp_path),HBACallback(checkpoint='s', seed=1)
    learn.fit(1)
    before,limits = fingerprint(learn),limited(5000)
    with pytest.raises(OSError, match='s.pth was not written, and what lay there before is as it was'):
        try: learn.fit(3, cbs=[hba,At(1, limits.__enter__)])
        finally: limits.__exit__(None, None, None)
    assert_plain(learn, before)
    assert [f.name for f in (tmp_path/'models').iterdir()]==['s.pth'] and load_checkpoint(tmp_path/'models'/'s.pth')['epoch']==1
    assert learn.hba_schedule.progress[-1]==pytest.approx(2/3) # what was found so far
    hba.schedule.save(tmp_path/'s.json')
    with limited(100), pytest.raises(OSError, match='s.json was not written'): hba.schedule.save(tmp_path/'s.json')
    assert Schedule.load(tmp_path/'s.json')==hba.schedule and len(list(tmp_path.glob('*')))==2

def test_a_folder_that_may_not_be_written_is_named_before_the_first_step():
    with tempfile.TemporaryDirectory() as t: # that of pytest may not be entered by others
        learn = small_learner(path=Path(t))
        learn.fit(1)
        before,weights = fingerprint(learn),learn.model[0].weight.clone()
        with stranger(Path(t)), pytest.raises(PermissionError, match='s.pth cannot be written, give'): learn.fit(1, cbs=HBACallback(checkpoint='s'))
    assert_plain(learn, before)
    assert torch.equal(learn.model[0].weight, weights)

def test_two_searches_with_one_checkpoint(tmp_path):
    "The second to write says so; the file is that of the first, and each has what it found"
    def learner(): return small_learner(path=tmp_path)
    a,b = learner(),learner()
    first,second = HBACallback(checkpoint='s', seed=1),HBACallback(checkpoint='s', seed=2)
    with pytest.raises(CheckpointError, match='give each a name of its own'): b.fit(2, cbs=[second,At(0, lambda: a.fit(2, cbs=first))])
    assert load_checkpoint(tmp_path/'models'/'s.pth')['search']['seed']==1
    assert len(b.hba_schedule)>1 and a.hba_schedule.provenance['seed']==1
    c = learner()
    c.fit(2, cbs=HBACallback(checkpoint='s', seed=2)) # one after the other: the name is free again
    c.fit(2, cbs=[HBACallback(checkpoint='s', seed=3),At(0, (tmp_path/'models'/'s.pth').unlink)]) # and a file may be taken away
    assert load_checkpoint(tmp_path/'models'/'s.pth')['search']['seed']==3

def test_a_clock_that_jumps(tmp_path, monkeypatch, capsys):
    "Back by a day, on by a year: what is found and what is printed do not depend on it"
    def search(name):
        run(None, None, 2, str(tmp_path/f'{name}.json'), 224, 64, 1e-3, 0, None, False, False, False)
        return Schedule.load(tmp_path/f'{name}.json'),capsys.readouterr().out
    whole,_ = search('a')
    jumps = iter([0.,-1e5,3e7]*10**6)
    real = time.time
    monkeypatch.setattr(time, 'time', lambda: real()+next(jumps))
    again,out = search('b')
    assert torch.equal(whole.table, again.table) and 0<=int(out.split()[-2])<1000

def full(f, after):
    "`f`, for which there is no memory left behind `after` calls"
    calls = []
    def g(*args):
        calls.append(1)
        if len(calls)>after: raise torch.OutOfMemoryError('CUDA out of memory')
        return f(*args)
    return g

@pytest.mark.parametrize('when', ['hyper-step','replay'])
def test_the_memory_of_a_gpu_is_full_in_our_own_code(when):
    "`test_undo` raises in every event; this is within"
    learn,policy = small_learner(),PBAPolicy()
    learn.fit(1)
    before = fingerprint(learn)
    if when=='hyper-step': cb = HBACallback(hyper_loss=full(F.cross_entropy, 2), warmup=0.)
    else:
        policy.draw = full(policy.draw, 2)
        cb = ScheduleCallback(Schedule([0.], policy.space.values(policy.space.start(0.05))[None]), policy=policy)
    with pytest.raises(torch.OutOfMemoryError): learn.fit(2, cbs=cb)
    assert_plain(learn, before)
    learn.fit(1)
