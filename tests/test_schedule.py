"Schedules: files by name, interpolation, and files that cannot be used"
import json
import pytest, torch
from hba_fastai.callback import ScheduleCallback
from hba_fastai.schedule import Schedule,ScheduleError
from hba_fastai.space import Space

space = Space()

@pytest.fixture
def schedule(): return Schedule([0,0.3,1], space.values(torch.randn(3,54, generator=torch.Generator().manual_seed(0)).double()*3), 0.7, dict(seed=3, strategy='first_bn'))

@pytest.fixture
def saved(schedule, tmp_path):
    schedule.save(tmp_path/'s.json')
    return json.loads((tmp_path/'s.json').read_text())

def test_round_trip(schedule, tmp_path):
    schedule.save(tmp_path/'s.json')
    s = Schedule.load(tmp_path/'s.json')
    assert torch.equal(s.table, schedule.table) and torch.equal(s.progress, schedule.progress) and s.sigma==0.7 and s.provenance==schedule.provenance
    assert torch.equal(ScheduleCallback(tmp_path/'s.json').schedule.table, s.table)

def test_names_not_positions(schedule, saved, tmp_path):
    "A file whose hyperparameters come in another order is the same schedule"
    saved['values'] = dict(sorted(saved['values'].items(), reverse=True))
    (tmp_path/'t.json').write_text(json.dumps(saved))
    assert torch.equal(Schedule.load(tmp_path/'t.json').table, schedule.table)

def test_interpolation(schedule):
    a,b = schedule.table[:2]
    assert torch.allclose(schedule.at(0.15), (a+b)/2) and torch.equal(schedule.at(0), a) and torch.equal(schedule.at(1), schedule.table[2])
    assert torch.allclose(schedule.at(0.3), b) and torch.equal(schedule.at(1.0000001), schedule.table[2])
    assert torch.allclose(space.values(schedule.lam(0.5).double()), schedule.at(0.5), atol=1e-4)

def change(d, **kw): return {**d, **kw}
def value(d, v): return change(d, values={**d['values'], 'Invert_1.p': v})

BAD = {'not json': (lambda d: '{"format": ', 'not JSON'), 'no schedule': (lambda d: [1,2], 'does not say'), 'another format': (lambda d: change(d, format='x'), 'does not say'),
       'newer': (lambda d: change(d, version=2), 'version 2 and this package reads version 1: update'), 'no version': (lambda d: {k:v for k,v in d.items() if k!='version'}, 'version None'),
       'missing': (lambda d: change(d, values={k:v for k,v in d['values'].items() if k!='Rotate_0.m'}), "lacks hyperparameters, 'Rotate_0.m'"),
       'unknown': (lambda d: change(d, values={**d['values'], 'Rotate_2.m': [1,2,3]}), "unknown hyperparameters, 'Rotate_2.m'"),
       'nan': (lambda d: value(d, [0.1,float('nan'),0.1]), 'Invert_1.p` is not a list of finite numbers'), 'infinite': (lambda d: value(d, [0.1,float('inf'),0.1]), 'finite'),
       'text': (lambda d: value(d, [0.1,'0.2',0.1]), 'finite numbers'), 'huge': (lambda d: value(d, [0.1,10**400,0.1]), 'finite numbers'), 'range': (lambda d: value(d, [0.1,1.2,0.1]), 'Invert_1.p has a value outside'),
       'length': (lambda d: value(d, [0.1,0.2]), '3 points of progress and another number'), 'progress': (lambda d: change(d, progress=[0,0.5,0.4]), 'do not ascend'),
       'empty': (lambda d: change(d, progress=[], values={k:[] for k in d['values']}), 'disagree'), 'sigma': (lambda d: change(d, sigma=-1), 'sigma is -1'), 'nested': (lambda d: '['*100_000, 'not JSON'),
       'no values': (lambda d: change(d, values=None), 'no table of values'), 'binary': (lambda d: b'\xff\xfe\x00', 'not JSON')}

@pytest.mark.parametrize('what', BAD)
def test_files_that_cannot_be_used(what, saved, tmp_path):
    make,match = BAD[what]
    d = make(saved)
    (tmp_path/'b.json').write_bytes(d if isinstance(d, bytes) else (d if isinstance(d, str) else json.dumps(d)).encode())
    with pytest.raises(ScheduleError, match=match): ScheduleCallback(tmp_path/'b.json')

def test_frame_and_plot(schedule):
    import matplotlib; matplotlib.use('Agg')
    assert schedule.frame().shape==(3,54)
    axs = schedule.plot()
    assert len(axs[0].lines)==15 and len(axs[1].lines)==12
