"`hba_train` as people start it: a model on disk, refusals in one sentence before anything trains, Ctrl-C"
import shutil,zipfile
import pytest
from fastai.learner import Learner,load_learner
from fastcore.script import CliError
from hba_fastai import train
from hba_fastai.cli import hba_train
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace
from conftest import write_images

pytestmark = pytest.mark.filterwarnings('ignore')
SMALL = dict(size=16, bs=8, epochs=2)

def unzipped(f): return b''.join(z.read(n) for z in [zipfile.ZipFile(f)] for n in z.namelist())

@pytest.fixture
def schedule(tmp_path):
    Schedule([0.], PBASpace().values(PBASpace().start())[None]).save(tmp_path/'s.json')
    return str(tmp_path/'s.json')

def test_a_model_that_predicts(tmp_path, pngs, schedule, capsys):
    out = tmp_path/'new'/'model.pkl'
    hba_train(str(pngs), schedule=schedule, out=str(out), target=str(write_images(tmp_path/'target', 12)), **SMALL)
    said = capsys.readouterr().out
    assert f"load_learner('{out}')" in said and f"{tmp_path/'target'} take 50% of each batch after 60%" in said
    assert load_learner(out).predict(pngs/'a'/'0.png')[0] in 'ab' and b'hba_fastai' not in unzipped(out)

def test_refused(tmp_path, pngs, schedule):
    (tmp_path/'odd.json').write_text('{}')
    named = shutil.copy(schedule, tmp_path/'schedule')
    for kw,match in ((dict(path='nowhere'), 'is no folder'), (dict(schedule='nowhere'), 'no.* schedule'), (dict(schedule=f'{tmp_path}/odd.json'), 'format'),
                     (dict(epochs=0), '1 or more'), (dict(target='nowhere'), "does not exist"), (dict(out=str(tmp_path)), 'is a folder'),
                     (dict(arch='resnet17x'), 'resnet17x'), (dict(out=f'{tmp_path}/S.JSON'), 'name of a schedule'),
                     (dict(schedule=named, out=named), 'is the schedule')):
        with pytest.raises(CliError, match=match) as e: hba_train(**{**dict(path=str(pngs), schedule=schedule, out=f'{tmp_path}/m.pkl'), **SMALL, **kw})
        assert len(str(e.value).splitlines())==1
    assert not (tmp_path/'m.pkl').exists()

def test_ctrl_c(tmp_path, pngs, schedule, monkeypatch):
    def stop(self): raise KeyboardInterrupt
    monkeypatch.setattr(train.ScheduleCallback, 'before_epoch', stop, raising=False)
    (tmp_path/'m.pkl').write_bytes(b'old')
    def go(): hba_train(str(pngs), schedule=schedule, out=f'{tmp_path}/m.pkl', **SMALL)
    with pytest.raises(KeyboardInterrupt, match='no model was written'): go()
    monkeypatch.undo()
    def half(self, f): f.write_bytes(b'half'); raise KeyboardInterrupt
    monkeypatch.setattr(Learner, 'export', half)
    with pytest.raises(KeyboardInterrupt, match='no model was written'): go()
    assert (tmp_path/'m.pkl').read_bytes()==b'old' and sorted(f.name for f in tmp_path.iterdir())==sorted([pngs.name,'m.pkl','s.json'])
