"Schedules: files by name, interpolation, and files that cannot be used"
import json,os,signal,subprocess,sys
from fractions import Fraction
from pathlib import Path
import numpy as np
import pytest, torch
from hba_fastai import files
from hba_fastai.data import digits_dls
from hba_fastai.schedule import Schedule,ScheduleError
from hba_fastai.search import ScheduleCallback
from hba_fastai.space import PBASpace,TABLE7

space = PBASpace()

@pytest.fixture
def schedule():
    return Schedule([0,0.3,1], space.values(torch.randn(3,54, generator=torch.Generator().manual_seed(0)).double()*3), 0.7, dict(seed=3, strategy='first_bn'))

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
def in_space(d, **kw): return change(d, space={**d['space'], **kw})
def value(d, v): return change(d, values={**d['values'], 'Invert_1.p': v})

BAD = {'not json': (lambda d: '{"format": ', 'not JSON'), 'no schedule': (lambda d: [1,2], 'does not say'),
       'another format': (lambda d: change(d, format='x'), 'does not say'),
       'newer': (lambda d: change(d, version=4), 'version 4 and this package reads versions 1 to 3: update'),
       'no version': (lambda d: {k:v for k,v in d.items() if k!='version'}, 'version None'),
       'missing': (lambda d: change(d, values={k:v for k,v in d['values'].items() if k!='Rotate_0.m'}), "lacks hyperparameters, 'Rotate_0.m'"),
       'unknown': (lambda d: change(d, values={**d['values'], 'Rotate_2.m': [1,2,3]}), "unknown hyperparameters, 'Rotate_2.m'"),
       'nan': (lambda d: value(d, [0.1,float('nan'),0.1]), 'Invert_1.p` must hold finite numbers'),
       'infinite': (lambda d: value(d, [0.1,float('inf'),0.1]), 'finite'),
       'text': (lambda d: value(d, [0.1,'0.2',0.1]), 'finite numbers'),
       'huge': (lambda d: value(d, [0.1,10**400,0.1]), 'finite numbers'), 'range': (lambda d: value(d, [0.1,1.2,0.1]), 'Invert_1.p has a value outside'),
       'length': (lambda d: value(d, [0.1,0.2]), '3 points of progress and another number'),
       'progress': (lambda d: change(d, progress=[0,0.5,0.4]), 'do not ascend'),
       'too early': (lambda d: change(d, progress=[-0.1,0.5,1]), 'leave .0,1.'), 'too late': (lambda d: change(d, progress=[0,0.5,1.1]), 'leave .0,1.'),
       'empty': (lambda d: change(d, progress=[], values={k:[] for k in d['values']}), 'disagree'),
       'sigma': (lambda d: change(d, sigma=-1), 'sigma is -1'), 'nested': (lambda d: '['*100_000, 'not JSON'),
       'no values': (lambda d: change(d, values=None), 'no table of values'), 'binary': (lambda d: b'\xff\xfe\x00', 'not JSON'),
       'no space': (lambda d: change(d, space=7), 'no table of the space:'), 'no spaces': (lambda d: change(d, spaces=7), 'no table of the spaces:'),
       'skip unknown': (lambda d: in_space(d, skip=['Rotate','Blur']), "`skip` names 'Blur', which is no operation"),
       'skip number': (lambda d: in_space(d, skip=7), '`skip` names 7'),
       'inactive nested': (lambda d: in_space(d, inactive=[['Color']]), 'which is no operation'),
       'limits unknown': (lambda d: in_space(d, limits={'Blur': [0,1]}), "`limits` names 'Blur'"),
       'limits list': (lambda d: in_space(d, limits=[1]), 'must be a dictionary'),
       'limits wide': (lambda d: in_space(d, limits={'Rotate': [0,90]}), 'whose magnitudes go from 0 to 30'),
       'limits exceeded': (lambda d: in_space(d, limits={'Rotate': [0,1e-3]}), 'Rotate_0.m has a value outside')}

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
    assert [len(ax.collections) for ax in axs]==[15,12]

def test_it_shows_images_at_five_points(schedule):
    axs = schedule.show(digits_dls(20, 10, bs=10, size=12), n=2)
    assert axs.shape==(5,2) and [row[0].texts[0].get_text() for row in axs]==['0%','25%','50%','75%','100%']

def calm(**kw):
    "A schedule that uses all that a schedule can say"
    sp = PBASpace(limits={'Rotate': (0,10), 'Cutout': [0.05,0.1]})
    values = sp.values(torch.randn(4,54, generator=torch.Generator().manual_seed(1)).double())
    return Schedule([0,0.2,0.5,1], values, **{**dict(sigma=0.5, provenance=dict(seed=1), skip=['Invert','AutoContrast'],
                                                     inactive=['Color'], limits=sp.limits), **kw})

def test_skip_inactive_and_limits_come_back_from_a_file(tmp_path):
    s = calm()
    l = Schedule.load(s.save(tmp_path/'s.json'))
    assert l==s and l.provenance==s.provenance
    assert l.skip==['AutoContrast','Invert'] and l.inactive==['Color'] and l.off==['AutoContrast','Invert','Color']
    assert l.limits=={'Rotate': (0,10), 'Cutout': (0.05,0.1)} and l.space.ranges==PBASpace(limits=l.limits).ranges
    assert torch.allclose(l.space.values(l.lam(0.2).double()), s.at(0.2), atol=1e-4)

def test_a_reader_that_knows_less_does_no_harm(tmp_path):
    "Skipped operations have probability 0 for any reader; limits, which it would exceed, make it refuse the file"
    def read(**kw): return json.loads(calm(**kw).save(tmp_path/'s.json').read_text())
    d = read(limits=None, provenance=None)
    assert d['version']==1 and all(d['values'][f'{o}_{c}.p']==[0.]*4 for o in ('Invert','AutoContrast') for c in (0,1)) and min(d['values']['Color_0.p'])>0
    assert read()['version']==2 and 'spaces' not in read() and read()['space']['copies']==2 # what that reader knows

def test_skipping_leaves_the_given_values_alone():
    values = space.values(torch.zeros(1,54).double())
    Schedule([0.], values, skip='Rotate')
    assert (values==space.values(torch.zeros(54).double())).all()

@pytest.mark.parametrize('change', [dict(sigma=0.4), dict(skip=['Invert']), dict(inactive=[]), dict(limits={'Rotate': (0,10)})])
def test_equal_are_schedules_that_are_replayed_alike(change):
    assert calm()==calm(provenance=dict(seed=2), skip=['AutoContrast','Invert','Invert'])
    assert calm()!=calm(**change) and calm()!='calm' and calm()!=calm().table
    nothing = space.lo[None] # all probabilities are 0 already
    assert Schedule([0.], nothing, skip='Invert')!=Schedule([0.], nothing)
    s = calm()
    s.table[2,7] += 1e-9
    assert s!=calm() and Schedule([0,0.2,0.6,1], calm().table)!=Schedule([0,0.2,0.5,1], calm().table)

@pytest.mark.parametrize('k,v', [('warmup','0.3'), ('until',[0.6]), ('augmentation',5), ('augmentation',[1])])
def test_what_pictures_and_replays_read_of_a_provenance(k, v, tmp_path):
    with pytest.raises(ScheduleError, match=f'`{k}`'): Schedule.load(calm(provenance={k: v}).save(tmp_path/'s.json'))

def test_provenance_is_what_the_file_gives_back(tmp_path):
    s = calm(provenance=dict(layers=('1','4'), hlr=np.float32(0.5), n=np.int64(3), path=tmp_path))
    assert s.provenance==dict(layers=['1','4'], hlr=0.5, n=3, path=str(tmp_path))==Schedule.load(s.save(tmp_path/'s.json')).provenance

OLD = Path(__file__).parent/'schedules'

def test_files_of_old_versions_load_for_ever():
    "Files as the first version of the package wrote them; never write these anew"
    a,b = (Schedule.load(OLD/f) for f in ('version1.json','version1_search.json'))
    expected = space.values(torch.randn(3,54, generator=torch.Generator().manual_seed(0)).double()*3)
    assert torch.allclose(a.table, expected) and a.progress.tolist()==[0,0.25,1] and a.sigma==0.7 and a.provenance=={}
    assert len(b)==4 and b.sigma==1 and b.provenance['strategy']=='first_bn' and b.provenance['epochs']==3 and b.provenance['seed']==3
    for s in (a,b): assert s.off==[] and s.limits=={}

@pytest.mark.parametrize('pct', [50, -1, 1.01, -0.01, float('nan'), float('inf')])
def test_what_is_no_progress_is_refused(schedule, pct):
    for f in (schedule.values,schedule.at,Schedule([0.], schedule.table[:1]).at):
        with pytest.raises(ScheduleError, match='progress goes from 0 to 1; for epoch 50 of 200 say 0.25'): f(pct)

def test_a_replay_goes_on_past_the_end(schedule):
    "A loader may give more batches than its length says"
    assert torch.equal(schedule.lam(1.4), schedule.lam(1))

def test_what_is_printed_is_short_and_ascii():
    end = torch.full((54,), 0.02).double()*(space.hi-space.lo)+space.lo
    for n,v in {'Rotate_0.p': 0.5, 'Rotate_1.p': 0.7, 'Rotate_0.m': 20, 'Rotate_1.m': 22, 'Invert_0.p': 0.3, 'Color_0.p': 0.9, 'Color_1.p': 0.9}.items():
        end[space.names.index(n)] = v
    s = Schedule([0,1], torch.stack([space.lo,end]), inactive=['Color'])
    assert repr(s)==str(s) and str(s).startswith('Schedule: 2 points, sigma 1; at the end Rotate p=0.60 m=21, Invert p=0.16, ')
    assert 'could not act in the search: Color' in str(s) and 'Color p' not in str(s) and str(s).count(' p=')==5
    for s in (calm(),Schedule([0.], calm(limits=None).table[:1], skip=list(TABLE7))):
        assert str(s).isascii() and len(str(s).splitlines())<=5
    with pytest.raises(ScheduleError) as e: Schedule([0.], space.lo[None], sigma=-1)
    assert str(e.value).isascii()

def test_reading_a_schedule_needs_neither_fastai_nor_pandas():
    code = f"""import sys
from hba_fastai.schedule import Schedule
print(Schedule.load({str(OLD/'version1.json')!r}))
assert not {{'fastai','pandas','matplotlib','torchvision'}} & set(sys.modules)
assert Schedule.load({str(OLD/'version1.json')!r}).frame().shape==(3,54)"""
    r = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True)
    assert r.returncode==0, r.stderr

def test_save_makes_the_folder_and_refuses_what_is_no_file(schedule, tmp_path):
    f = schedule.save(str(tmp_path/'new'/'folder'/'s.json'))
    assert f==tmp_path/'new'/'folder'/'s.json' and Schedule.load(f)==schedule
    for name in (tmp_path, str(tmp_path/'new')+'/', f'{tmp_path}/results/', '', os.devnull):
        with pytest.raises(ScheduleError, match='is a folder or a device: give the name of a file'): schedule.save(name)
    assert not (tmp_path/'results').exists()

def test_save_through_a_link_keeps_the_link(schedule, tmp_path):
    (tmp_path/'link.json').symlink_to(tmp_path/'s.json')
    schedule.save(tmp_path/'link.json')
    assert (tmp_path/'link.json').is_symlink() and not (tmp_path/'s.json').is_symlink() and Schedule.load(tmp_path/'s.json')==schedule

def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(schedule, tmp_path, monkeypatch):
    schedule.save(tmp_path/'s.json')
    def full(fd): raise OSError(28, 'no space left')
    monkeypatch.setattr(files.os, 'fsync', full)
    with pytest.raises(OSError, match='no space left'): calm().save(tmp_path/'s.json')
    assert Schedule.load(tmp_path/'s.json')==schedule and os.listdir(tmp_path)==['s.json']

def test_sigkill_in_the_middle_of_a_write(schedule, tmp_path):
    "The old file stays whole; the next write removes what the killed process left, and nothing of a process that lives"
    f = schedule.save(tmp_path/'s[1].json')
    code = f"""import os,signal
from hba_fastai import files
files.os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
files.write_whole({str(f)!r}, b'half of it')"""
    p = subprocess.run([sys.executable,'-W','ignore','-c',code])
    left = [o for o in tmp_path.iterdir() if o!=f]
    assert p.returncode==-signal.SIGKILL and Schedule.load(f)==schedule and [o.read_bytes() for o in left]==[b'half of it']
    host = files.platform.node()
    alive,elsewhere,mine = (tmp_path/o for o in (f's[1].json.{host}.{os.getppid()}.tmp', 's[1].json.another-host.999999999.tmp', 's[1].json.tmp'))
    for o in (alive,elsewhere,mine): o.touch()
    calm().save(f)
    assert Schedule.load(f)==calm() and set(tmp_path.iterdir())=={f,alive,elsewhere,mine}

def test_a_file_at_home(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    monkeypatch.chdir(tmp_path)
    s = calm()
    assert s.save('~/s.json')==tmp_path/'s.json' and Schedule.load('~/s.json')==s and not (tmp_path/'~').exists()

def test_what_is_handed_out_is_not_the_schedule():
    s = Schedule([0.5], space.values(torch.zeros(1,54).double()))
    before = s.table.clone()
    s.at(0.2)[0] = 1
    df = s.frame()
    df.iloc[:,0] = 1.
    assert torch.equal(s.table, before) and s.at(Fraction(1,2)).equal(before[0])

def test_a_file_keeps_its_rights_and_a_long_name_is_told(tmp_path):
    f = tmp_path/'f'
    f.write_bytes(b'old')
    f.chmod(0o640)
    files.write_whole(f, b'new')
    assert f.stat().st_mode&0o777==0o640
    with pytest.raises(OSError, match='was not written'): files.write_whole(tmp_path/('x'*250), b'new')
