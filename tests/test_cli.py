"The command as people start it: in a terminal, a notebook, a pipe; what it refuses; and what is on disk however it ends"
import os,pty,re,signal,subprocess,sys
from functools import partial
from pathlib import Path
import numpy as np
import pytest
from fastai.learner import load_learner
from fastai.vision.core import PILImage
from fastcore.script import CliError
from fasttransform import Transform
from fastcore.test import test_eq as same
from conftest import write_images
from PIL import Image
from hba_fastai import session
from hba_fastai.search import HBACallback
from hba_fastai.cli import hba_search
from hba_fastai.data import in_memory
from hba_fastai.folder import folder_dls,folder_learner,split_folder
from hba_fastai.items import check_readable
from hba_fastai.schedule import Schedule

pytestmark = pytest.mark.filterwarnings('ignore')
COMMAND = str(Path(sys.executable).with_name('hba_search'))
ENV = {k:v for k,v in os.environ.items() if k!='PYTHONWARNINGS'} | {'COLUMNS': '80'}
SMALL = '--size 16 --bs 8'.split()

def search(*args, env={}, **kw):
    return subprocess.run([COMMAND, *map(str, args)], capture_output=True, text=True, timeout=300, env=ENV|env, **kw)

def in_terminal(*args, cwd=None):
    "Exit status and output of the command in a terminal of 80 columns"
    mine,its = pty.openpty()
    p = subprocess.Popen([COMMAND, *map(str, args)], stdin=its, stdout=its, stderr=its, env=ENV, cwd=cwd)
    os.close(its)
    out = b''
    try:
        while got := os.read(mine, 4096): out += got
    except OSError: pass # how Linux says that the other end is closed
    os.close(mine)
    return p.wait(),out.decode().replace('\r\n', '\n')

def rows(text):
    "Table rows of the output, without the progress bars that were drawn over"
    lines = [l.split('\r')[-1] for l in text.splitlines()]
    return [l for l in lines if re.match(r' *(epoch |\d+ +\d+\.\d)', l)]

def test_on_a_folder_through_a_pipe_that_is_not_utf8(tmp_path):
    write_images(tmp_path/'all'/'train', classes=('a','λ日'))
    write_images(tmp_path/'all'/'test', 6)
    r = search(tmp_path/'all', '--epochs', 2, *SMALL, '--out', tmp_path/'new'/'λ.json', env={'PYTHONIOENCODING': 'cp1252'})
    assert r.returncode==0 and r.stderr=='', r.stderr[-2000:]
    assert len(Schedule.load(tmp_path/'new'/'λ.json'))==4 and all((tmp_path/'new'/f).exists() for f in ('λ.png','λ.html')) and r'\u03bb.json' in r.stdout
    assert 'Left out: test (6 images)' in r.stdout and '32 training and 8 validation images' in r.stdout
    assert 'ScheduleCallback(' in r.stdout and 'hyper-steps cannot make an operation stand out' in r.stdout.replace('\n', ' ')
    table = rows(r.stdout)
    assert len(table)==3 and table[0].split()[:2]==['epoch','train_loss'] and len({len(l) for l in table})==1
    assert not re.search(r'\.\d{5}|None', ''.join(table))

@pytest.mark.slow # `.ci/run` does so too
def test_on_the_digits_in_a_terminal(tmp_path):
    status,out = in_terminal('--epochs', 2, cwd=tmp_path)
    assert status==0, out[-2000:]
    rows_of_table = ('trained on the 500 alone','fine-tuned on the 100','mixed in late','one fit with HBACallback','1197 images of the other camera')
    for row in rows_of_table: assert row in out
    table = rows(out)
    assert len(table)==3 and max(map(len, table))<=80 and out.splitlines()[-1].endswith('seconds')
    assert len(Schedule.load(tmp_path/'schedule.json'))==5

@pytest.mark.slow
def test_in_a_notebook(tmp_path, pngs):
    "IN_NOTEBOOK is decided when fastcore is imported, so the shell must be there before"
    cell = f"from hba_fastai.cli import hba_search\nhba_search({str(pngs)!r}, epochs=2, size=16, bs=8, out={str(tmp_path/'s.json')!r})\n" \
           "from fastcore.imports import IN_NOTEBOOK\nassert IN_NOTEBOOK"
    code = f"from IPython.core.interactiveshell import InteractiveShell as S\nS.instance().run_cell({cell!r}).raise_error()"
    r = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=300, env=ENV)
    assert r.returncode==0, r.stderr[-2000:]+r.stdout[-2000:]
    assert len(Schedule.load(tmp_path/'s.json'))==4

def test_help_is_quick():
    subprocess.run([sys.executable, '-c', "import hba_fastai.cli, sys; assert not {'torch','fastai','matplotlib'} & set(sys.modules)"], check=True)
    assert search('--help').stderr==''

def interrupted(row, presses, out, epochs='60'):
    "Exit status and last words of a search on the digits, after Ctrl-C when `row` was printed"
    p = subprocess.Popen([COMMAND, '--epochs', epochs, '--out', str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=ENV)
    for line in p.stdout:
        if re.match(row, line): break
    for _ in range(presses): p.send_signal(signal.SIGINT)
    return p.communicate(timeout=300)[1].strip().splitlines(),p.returncode

def test_ctrl_c_pressed_twice_says_where_the_schedule_is(tmp_path):
    out = tmp_path/'s.json'
    words,status = interrupted(' +12 ', 2, out, epochs='30')
    assert status==130 and len(words)==1 and words[0].endswith(f'of the search, is in {out}'), words
    assert 0.4<Schedule.load(out).progress[-1]<0.9

@pytest.mark.slow
def test_ctrl_c_in_the_comparison_keeps_the_whole_schedule(tmp_path):
    out = tmp_path/'s.json'
    words,status = interrupted('The other things', 1, out, epochs='3')
    assert status==130 and words==[f'Stopped: the schedule until then, 100% of the search, is in {out}'] and Schedule.load(out).progress[-1]==1

def test_ctrl_c_before_anything_was_found(tmp_path):
    words,status = interrupted('Search', 1, tmp_path/'s.json')
    assert status==130 and len(words)==1 and words[0].startswith('Stopped') and words[0].endswith('written'), words
    assert not (tmp_path/'s.json').exists()

def test_an_error_in_the_training_keeps_what_was_found(tmp_path, pngs, monkeypatch):
    def after_epoch(self):
        keep(self)
        if self.learn.epoch==2: raise ValueError("The disk is on fire")
    keep = session.KeepCallback.after_epoch
    monkeypatch.setattr(session.KeepCallback, 'after_epoch', after_epoch)
    with pytest.raises(CliError, match='on fire.*50% of the search, is in'): hba_search(str(pngs), epochs=6, size=16, bs=8, out=str(tmp_path/'s.json'))
    assert len(Schedule.load(tmp_path/'s.json'))==5

def test_a_search_that_went_nowhere_writes_nothing(tmp_path, pngs, monkeypatch):
    monkeypatch.setattr(HBACallback, 'hyper_step', lambda self: None)
    with pytest.raises(CliError, match='never left its start'): hba_search(str(pngs), epochs=2, size=16, bs=8, out=str(tmp_path/'s.json'))
    assert not list(tmp_path.glob('s.*'))

def test_refusals(pngs, tmp_path):
    (tmp_path/'empty').mkdir()
    write_images(tmp_path/'one', classes='a')
    write_images(tmp_path/'few', 4)
    write_images(tmp_path/'kaggle', classes=('train','test'))
    write_images(tmp_path/'parts'/'test')
    (tmp_path/'few'/'a'/'cut.png').write_bytes((pngs/'a'/'0.png').read_bytes()[:300])
    im,out = str(pngs),str(tmp_path/'s.json')
    for kw,match in ((dict(path='nowhere'), 'is no folder'),
                     (dict(path=f'{tmp_path}/empty'), 'holds no images'),
                     (dict(path=f'{tmp_path}/one'), 'one sub-folder per class'),
                     (dict(path=f'{tmp_path}/kaggle'), 'no folders of classes'),
                     (dict(path=f'{tmp_path}/parts'), 'no such folder `train`'),
                     (dict(path=f'{tmp_path}/few'), r'cut\.png \(cannot be read'),
                     (dict(epochs=0), '1 or more'), (dict(size=0), '--size'), (dict(bs=0), '--bs'), (dict(bs=1), '--bs'),
                     (dict(lr=-1), '--lr'), (dict(seed=-1), '--seed'),
                     (dict(epochs=1, bs=64), 'no hyper-step'), (dict(same=True), '--same is for the digits'),
                     (dict(target='nowhere'), "target='nowhere' does not exist"), (dict(path=None, target=im), 'bring a target of their own'),
                     (dict(out=str(tmp_path)), 'is a folder'), (dict(out='x.pth', resume=True), 'name of the checkpoint'),
                     (dict(out='x.png'), 'name of a picture'),
                     (dict(out=f'{im}/a/0.png/s.json'), 'cannot be written'),
                     (dict(arch='resnet17x'), 'resnet17x'), (dict(arch='ResNet'), 'no classifier'),
                     (dict(arch='vit_tiny_patch16_224', size=32), 'does not take'),
                     (dict(strategy='nonsense'), 'nonsense'), (dict(skip='Inverse'), 'Inverse'), (dict(limits='Rotate=0:90'), 'from 0 to 30')):
        with pytest.raises(CliError, match=match) as e: hba_search(**{**dict(path=im, epochs=2, size=16, bs=8, out=out), **kw})
        assert len(str(e.value).splitlines())==1, e
    assert not list(tmp_path.glob('s.*'))
    r = search('nowhere', cwd=tmp_path)
    assert r.returncode==1 and 'is no folder' in r.stderr and 'Traceback' not in r.stderr

@pytest.mark.parametrize('name,make', [('empty', lambda f: f.write_bytes(b'')), ('text', lambda f: f.write_text('hello')),
                                       ('bits', lambda f: Image.fromarray(np.full((9,9), 40000, np.uint16)).save(f))])
def test_images_that_cannot_be_used_are_named(tmp_path, name, make):
    make(tmp_path/f'{name}.png')
    match = f'1 of 1 image files of a folder cannot be used, .*{name}.png'
    with pytest.raises(ValueError, match=match): check_readable([tmp_path/f'{name}.png'], 'a folder', rgb=True)
    if name=='bits': check_readable([tmp_path/f'{name}.png'], 'a folder') # a Learner may read 16 bits in its own way

def test_images_of_all_kinds_are_used(tmp_path):
    for c in 'ab':
        (tmp_path/c).mkdir()
        for i,mode in enumerate('RGB RGBA L LA P 1 CMYK'.split()): Image.new(mode, (1+9*i,3)).save(tmp_path/c/f"{i}.{'tif' if mode=='CMYK' else 'png'}")
        Image.new('L', (8,8)).save(tmp_path/c/'moving.gif', save_all=True, append_images=[Image.new('L', (8,8), 200)])
    train,valid,_ = split_folder(tmp_path, 0)
    check_readable(train+valid, 'a folder', rgb=True)
    assert len(train+valid)==16 and folder_dls(train, valid, 16, 64, 0).one_batch()[0].shape[1:]==(3,16,16)

def test_each_class_is_held_out_unless_it_has_one_image(tmp_path):
    for name,n in (('two',4), ('one',2)): write_images(tmp_path/name, n)
    train,valid,_ = split_folder(tmp_path/'two', 0)
    assert sorted(f.parent.name for f in train)==sorted(f.parent.name for f in valid)==['a','b']
    assert split_folder(tmp_path/'two', 0)[1]==valid
    write_images(tmp_path/'two', 3, classes='c')
    train,valid,_ = split_folder(tmp_path/'two', 0)
    assert [sorted(f.parent.name for f in fs) for fs in (train,valid)]==[['a','b','c','c'],['a','b','c']]
    with pytest.raises(CliError, match='The 2 classes under .* have one image each'): split_folder(tmp_path/'one', 0)

def test_a_target_folder(pngs, tmp_path):
    "Its images steer the search and join training; what the plan says of them holds"
    target,out = write_images(tmp_path/'target', 3),tmp_path/'s.json'
    r = search(pngs, '--target', target, '--epochs', 5, *SMALL, '--out', out)
    assert r.returncode==0, r.stderr
    assert 'take 50% of each batch from epoch 3, when the policy is fixed' in r.stdout
    s = Schedule.load(out)
    assert s.provenance['target'].endswith(str(target)) and s.provenance['until']==0.6 and (s.at(0.6)==s.at(1)).all()

def test_links_do_not_put_an_image_on_both_sides(pngs):
    (pngs/'loop').symlink_to(pngs)
    (pngs/'z').symlink_to(pngs/'a')
    for f in (pngs/'b').iterdir(): (pngs/'a'/f'link{f.name}').symlink_to(f)
    train,valid,_ = split_folder(pngs, 0)
    assert len(train+valid)==len({f.name for f in train+valid})==40 and not any(f.is_symlink() for f in train+valid)

def test_a_folder_that_may_not_be_read_is_named(pngs, monkeypatch):
    plain = os.scandir
    def scandir(path):
        if Path(path).name=='b': raise PermissionError(13, 'Permission denied', str(path))
        return plain(path)
    monkeypatch.setattr(os, 'scandir', scandir)
    with pytest.raises(CliError, match=r'/b cannot be read \(Permission denied\)'): split_folder(pngs, 0)

def test_choices_reach_the_callback(monkeypatch, tmp_path):
    got = {}
    def fake(**kw): got.update(kw); raise CliError('enough')
    monkeypatch.setattr(session, 'HBACallback', fake)
    with pytest.raises(CliError): hba_search(strategy='first_norm', skip='Invert,Solarize', limits='Rotate=0:10,TranslateX=0:0.1', seed=3, sparing=True)
    assert got.pop('target').n==100
    assert got==dict(seed=3, strategy='first_norm', skip=['Invert','Solarize'], limits={'Rotate': (0,10), 'TranslateX': (0,0.1)}, sparing=True)
    got.clear()
    with pytest.raises(CliError): hba_search(hlr=0.05, sigma=0., resume=True, out=str(tmp_path/'s.json'))
    assert got.pop('target').n==100 and got==dict(seed=0, hlr=0.05, sigma=0., checkpoint=tmp_path/'s.pth', resume=True)

def test_a_search_goes_on(tmp_path, pngs, monkeypatch):
    "Stopped in its fourth epoch and started again, it finds what one without a stop finds"
    def stop(self):
        if self.learn.epoch==3: raise KeyboardInterrupt
    kw = dict(epochs=6, size=16, bs=8, resume=True)
    hba_search(str(pngs), out=str(tmp_path/'whole.json'), **kw)
    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(session.KeepCallback, 'before_epoch', stop, raising=False)
        hba_search(str(pngs), out=str(tmp_path/'s.json'), **kw)
    assert (tmp_path/'s.pth').exists() and len(Schedule.load(tmp_path/'s.json'))<7
    hba_search(str(pngs), out=str(tmp_path/'s.json'), **kw)
    assert Schedule.load(tmp_path/'s.json')==Schedule.load(tmp_path/'whole.json') and not list(tmp_path.glob('*.pth'))

def learner_of(pngs):
    train,valid,_ = split_folder(pngs, 0)
    session.set_seed(0)
    return folder_learner(folder_dls(train, valid, 16, 8, 0), 'resnet18', 16)

def test_memory_changes_no_bit_of_a_search(pngs, tmp_path, monkeypatch):
    tables = []
    for limit in (0,2**30):
        hba = HBACallback(seed=0)
        monkeypatch.setattr(session, 'in_memory', partial(in_memory, limit=limit))
        session.search(learner_of(pngs), hba, 2, 1e-3, tmp_path/'s.json')
        tables.append(hba.schedule.table)
    same(*tables)

def test_memory_does_not_hold_what_may_be_drawn(pngs):
    class Mine(Transform):
        def encodes(self, x:PILImage): return x
    learn = learner_of(pngs)
    learn.dls.train.after_item.add(Mine())
    with in_memory(learn.dls): assert not hasattr(learn.dls.train.dataset, 'held')

def test_memory_leaves_ordinary_loaders(pngs, tmp_path):
    learn,f = learner_of(pngs),pngs/'a'/'0.png'
    before = learn.predict(f)[2]
    with in_memory(learn.dls):
        with learn.no_bar(): learn.fit(1, lr=0.)
        assert learn.dls.train.num_workers==1 and hasattr(learn.dls.train.dataset, 'held')
    assert not hasattr(learn.dls.train.dataset, 'held') and learn.dls.test_dl([f]).one_batch()[0].shape==(1,3,16,16)
    with learn.no_bar(): assert learn.predict(f)[0] in 'ab' and len(learn.tta()[0])==8 and before.shape==(2,)
    learn.export(tmp_path/'learn.pkl')
    assert b'hba_fastai' not in (tmp_path/'learn.pkl').read_bytes() and load_learner(tmp_path/'learn.pkl').dls.vocab==['a','b']
