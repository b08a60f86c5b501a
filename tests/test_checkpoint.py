"Checkpoints: where their files lie, what is refused, which settings must agree"
import os,signal,subprocess,sys
from pathlib import Path
import numpy as np
import pytest, torch
from fastcore.foundation import L
from hba_fastai.checkpoint import CheckpointError,MAGIC,checkpoint_path,differences,load_checkpoint,refuse_differences,save_checkpoint

def test_round_trip_makes_the_folder_and_leaves_one_file(tmp_path):
    f = save_checkpoint(tmp_path/'models'/'s.pth', dict(lam=torch.arange(3.), same=dict(layers=['1'], hlr=0.1)))
    d = load_checkpoint(f)
    assert torch.equal(d['lam'], torch.arange(3.)) and d['same']==dict(layers=['1'], hlr=0.1) and os.listdir(tmp_path/'models')==['s.pth']

def test_sigkill_in_the_middle_of_a_write(tmp_path):
    f = save_checkpoint(tmp_path/'s.pth', dict(epoch=1))
    code = f"""import os,signal
from hba_fastai import checkpoint,files
files.os.fsync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)
checkpoint.save_checkpoint({str(f)!r}, dict(epoch=2))"""
    assert subprocess.run([sys.executable,'-W','ignore','-c',code]).returncode==-signal.SIGKILL
    assert load_checkpoint(f)==dict(epoch=1) and len(os.listdir(tmp_path))==2
    save_checkpoint(f, dict(epoch=3))
    assert load_checkpoint(f)==dict(epoch=3) and os.listdir(tmp_path)==['s.pth']

def test_a_folder_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match='give the name of a file'): save_checkpoint(tmp_path, {})

class Deed:
    "What a pickle can hold: on reading, a call"
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir,(str(self.path),)

def test_nothing_in_a_file_is_executed(tmp_path):
    "Also where its digest is right, as anybody can compute it"
    f = save_checkpoint(tmp_path/'s.pth', dict(epoch=1, deed=Deed(tmp_path/'done')))
    with pytest.raises(CheckpointError, match='holds more than tensors, numbers and text'): load_checkpoint(f)
    assert os.listdir(tmp_path)==['s.pth']

HEADS = {'older': (b'hba-fastai checkpoint 3\n', 'was written by an older version of hba-fastai and cannot be continued: start a new search'),
         'oldest': (b'hba-fastai checkpoint 1\n', 'older version'), 'newer': (b'hba-fastai checkpoint 10\n', 'newer version'),
         'much newer': (b'hba-fastai checkpoint 12\n', 'newer version'),
         'padded': (b'hba-fastai checkpoint 09\n', 'does not begin as a checkpoint'), 'another file': (b'PK', 'does not begin'),
         'empty': (b'', 'does not begin'),
         'cut': (MAGIC[:-1], 'does not begin'), 'no content': (MAGIC, 'damaged')}

@pytest.mark.parametrize('what', HEADS)
def test_beginnings_that_are_refused(what, tmp_path):
    head,match = HEADS[what]
    data = save_checkpoint(tmp_path/'s.pth', dict(epoch=1)).read_bytes()
    (tmp_path/'s.pth').write_bytes(head if head in (b'',MAGIC,MAGIC[:-1]) else head+data[len(MAGIC):])
    with pytest.raises(CheckpointError, match=match) as e: load_checkpoint(tmp_path/'s.pth')
    assert str(e.value).isascii()

@pytest.mark.parametrize('name,path', [('y','models/y.pth'), ('y.pth','models/y.pth'), (Path('y.pth'),'models/y.pth'),
                                       ('run.2','models/run.2.pth'), ('a/y','a/y.pth'), ('./y.pth','y.pth'),
                                       ('/data/y.pth','/data/y.pth'), ('/data/y','/data/y.pth'), ('~/y','HOME/y.pth')])
def test_where_a_checkpoint_lies(name, path, monkeypatch):
    monkeypatch.setenv('HOME', 'HOME')
    assert checkpoint_path(name, 'models')==checkpoint_path(name, Path('models'), rank=0)==Path(path)
    assert checkpoint_path(name, 'models', rank=1)==Path(path.replace('.pth', '_1.pth'))

@pytest.mark.parametrize('name', ['', '.pth', 'models/', True, 3])
def test_what_names_no_file(name):
    with pytest.raises(CheckpointError, match='must be the name of a file'): checkpoint_path(name, 'models')

def test_settings_agree_by_value(tmp_path):
    "Also after the file, which gives Python's own types back"
    now = dict(layers=('1','4'), hypers=L('lr','mom'), bs=np.int64(64), shape=torch.tensor([3,12]), hlr=0.1, seed=None, start=dict(p=(0.05,0.3)))
    saved = load_checkpoint(save_checkpoint(tmp_path/'s.pth',
                                            dict(same=dict(layers=['1','4'], hypers=['lr','mom'], bs=64, shape=[3,12], hlr=0.1,
                                                           start=dict(p=[0.05,0.3])))))['same']
    assert differences(saved, now)==[]
    refuse_differences('s.pth', saved, now)

def test_settings_differ_exactly():
    assert differences(dict(a=0.1, b=[1,2], c=2, gone=1), dict(b=(2,1), a=np.nextafter(0.1, 1), c=2, new='x'))==[('b',[1,2],
        [2,1]), ('a',0.1,np.nextafter(0.1, 1)), ('new',None,'x'), ('gone',1,None)]

@pytest.mark.parametrize('now,says', [(dict(T_train=3, bs=64, items=9),
                                       's.pth was made with T_train=2 and this search has 3: '
                                        'go on with the same settings, or start a new search with another name'),
                                      (dict(T_train=2, bs=32, items=8), 's.pth was made with bs=64 and this search has 32 (and 1 more setting differs): go on'),
                                      (dict(T_train=3), 's.pth was made with T_train=2 and this search has 3 (and 2 more settings differ): go on')])
def test_the_refusal_names_the_first_and_counts_the_rest(now, says):
    with pytest.raises(CheckpointError) as e: refuse_differences('s.pth', dict(T_train=2, bs=64, items=9), now)
    assert str(e.value).startswith(says) and str(e.value).isascii()

def test_long_values_show_where_they_differ():
    layers = [f'layer{i}.conv' for i in range(50)]
    with pytest.raises(CheckpointError) as e: refuse_differences('s.pth', dict(layers=layers), dict(layers=[*layers[:40],'bn',*layers[41:]]))
    assert "layer40.conv" in str(e.value) and "'bn'" in str(e.value) and len(str(e.value))<300
