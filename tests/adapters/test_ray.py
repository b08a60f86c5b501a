"A population on Ray, on two local workers: copies change λ in the worker, once the donor's state is loaded; a worker that is killed is survived"
import os,shutil,signal
from types import SimpleNamespace
import pytest
ray = pytest.importorskip('ray', reason="needs the extra `ray`")
from fastai.callback.core import Callback
from fastai.callback.schedule import Learner # with `fit_one_cycle`
from hba_fastai.checkpoint import load_checkpoint
from hba_fastai.data import digits_dls
from hba_fastai.hpm import HPM
from hba_fastai.member import JUMP
from hba_fastai.on_ray import fit_on_ray,trainable
from hba_fastai.population import PBT
from hba_fastai.space import PBASpace
from ray import tune
from torch import nn

@pytest.fixture(scope='module')
def two_workers():
    os.environ['RAY_worker_niceness'] = '0' # on a busy machine others would starve them
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()

def maker(*cbs):
    "Made in a function: what the workers import is not this module"
    def make():
        net = nn.Sequential(nn.Conv2d(3,8,3,2,1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128,10))
        return Learner(digits_dls(60, 40, bs=20, size=8, device='cpu'), net, cbs=[cb() for cb in cbs])
    return make

def dies_once(folder):
    class Die(Callback):
        "Notes the epochs that are trained, and kills the process of the first member that comes to its third epoch"
        run_valid = False
        def before_train(self):
            with open(f'{folder}/epochs', 'a') as f: f.write(f'{self.learn.epoch} ')
        def before_batch(self):
            if self.learn.epoch==2 and not os.path.exists(f'{folder}/killed'):
                open(f'{folder}/killed', 'w').close()
                os.kill(os.getpid(), signal.SIGKILL)
    return Die

@pytest.mark.parametrize('kind', [PBT,HPM])
def test_ray(kind, tmp_path, two_workers):
    pop = kind(maker(dies_once(tmp_path)), n=2, share=0.5, **(dict(warmup=0.) if kind is HPM else {}))
    results = fit_on_ray(pop, 4, 1e-2, method='fit_one_cycle')
    assert (tmp_path/'killed').exists() and not results.errors and len(results)==2
    trained = (tmp_path/'epochs').read_text().split()
    assert trained.count('0')==2 and {r.metrics['epoch'] for r in results}=={4} # nobody began anew: the one that was killed went on
    states = [m.read() for m in pop.members]
    copies = [d for d in states if len(d['lineage'])>1]
    assert copies # one of two is replaced at each comparison
    for d in copies: check_copy(d, kind)
    assert pop.schedule.progress[-1]==1 and pop.best.hba_schedule==pop.schedule

def check_copy(d, kind):
    "Behind a copy λ is another, by 0.8 or 1.2 or as the teacher says"
    at,lams,space = d['search']['at'],d['search']['lams'],PBASpace()
    jumps = [i for i,a in enumerate(at) if abs(a-round(a)-JUMP)<JUMP/2]
    assert [round(at[i]) for i in jumps]==[e for e,_ in d['lineage'][1:]]
    for i in jumps:
        if kind is PBT:
            ratio = space.values(lams[i])/space.values(lams[i-1])
            assert ((ratio-0.8).abs().minimum((ratio-1.2).abs())<1e-4).sum()>=45 # but for what is at its bound
        else: assert not lams[i].equal(lams[i-1])

def fails_once(folder):
    class Fail(Callback):
        "Notes the epochs that are trained; the second member to come to its third epoch ends the run"
        run_valid = False
        def before_train(self):
            with open(f'{folder}/epochs', 'a') as f: f.write(f'{self.learn.epoch} ')
            if self.learn.epoch==2 and not os.path.exists(f'{folder}/failed'):
                open(f'{folder}/failed', 'w').close()
                raise OSError('no space left')
    return Fail

def test_a_run_that_ended_goes_on(tmp_path, two_workers):
    "Behind the last epoch that all had finished, which are compared again from there; done, nothing trains; another fit is refused"
    new = lambda **kw: PBT(maker(fails_once(tmp_path)), n=2, share=0.5, checkpoint=tmp_path/'pop', **kw)
    with pytest.raises(RuntimeError, match=r'^Member \d ended on Ray by the error above: .*fit again with `resume=True`$') as e:
        fit_on_ray(new(), 4, 1e-2, max_failures=0)
    assert 'no space left' in str(e.value.__cause__)
    first = (tmp_path/'epochs').read_text().split()
    pop = new(resume=True)
    results = fit_on_ray(pop, 4, 1e-2)
    trained = (tmp_path/'epochs').read_text().split()
    assert not results.errors and {r.metrics['epoch'] for r in results}=={4} and trained[len(first):]==['2','2','3','3']
    assert [m.read()['lineage'][-1][1] for m in pop.members]==[0,1] # behind the last epoch nobody is copied
    again = new(resume=True)
    fit_on_ray(again, 4, 1e-2)
    assert (tmp_path/'epochs').read_text().split()==trained and again.schedule==pop.schedule
    with pytest.raises(ValueError, match='was made with fit='): fit_on_ray(new(resume=True), 5, 1e-2)

def test_an_epoch_that_is_reported_again_teaches_nothing_new(tmp_path, monkeypatch):
    pop = HPM(maker(), n=2, share=0.5, warmup=0., checkpoint=tmp_path/'pop')
    pop.make_members(fit := ('fit', (2,1e-2), {}))
    seen,last = [],[]
    def report(metrics, checkpoint):
        shutil.copytree(checkpoint.path, folder := tmp_path/f'report_{len(seen)}')
        last[:] = [tune.Checkpoint.from_directory(folder)]
        seen.append((metrics['epoch'],load_checkpoint(folder/'lessons.pth')))
    monkeypatch.setattr(tune, 'get_context', lambda: SimpleNamespace(get_trial_id=lambda: 'run_00000'))
    monkeypatch.setattr(tune, 'get_checkpoint', lambda: last[0] if last else None)
    monkeypatch.setattr(tune, 'report', report)
    for _ in range(2): trainable(pop, fit)({})
    epochs,lessons = zip(*seen)
    assert epochs==(1,2,2)
    assert not lessons[1]['teacher']['V'].equal(lessons[0]['teacher']['V']) # behind the second epoch it learns
    assert all(lessons[2]['teacher'][k].equal(lessons[1]['teacher'][k]) for k in 'VW')

def test_no_other_place_for_a_run_that_goes_on(tmp_path):
    with pytest.raises(ValueError, match='run_config keeps them elsewhere'):
        fit_on_ray(PBT(maker(), n=2, checkpoint=tmp_path/'pop', resume=True), 1, run_config=tune.RunConfig('other'))

def test_without_ray(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match="Ray is not installed: `pip install 'hba-fastai.ray.'`"): fit_on_ray(PBT(maker(), n=2), 1)
