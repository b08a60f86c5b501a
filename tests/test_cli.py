"The command: on a folder, on the digits, and on what is no folder of images"
import subprocess,sys
from pathlib import Path
import pytest
from PIL import Image
from hba_fastai.data import digits
from hba_fastai.schedule import Schedule

pytestmark = pytest.mark.filterwarnings('ignore')

@pytest.fixture
def pngs(tmp_path):
    x,y = digits(24)
    for i in range(40):
        f = tmp_path/'im'/f'{y[i]%2}'/f'{i}.png'; f.parent.mkdir(exist_ok=True, parents=True)
        Image.fromarray(x[i].permute(1,2,0).numpy()).save(f)
    return tmp_path/'im'

def search(*args, **kw):
    return subprocess.run([str(Path(sys.executable).with_name('hba_search')), *map(str, args)], capture_output=True, text=True, timeout=300, **kw)

def test_on_a_folder(pngs, tmp_path):
    r = search(pngs, '--arch', 'resnet18', '--epochs', 2, '--size', 32, '--bs', 8, '--out', tmp_path/'new'/'s.json')
    assert r.returncode==0, r.stderr[-2000:]
    assert len(Schedule.load(tmp_path/'new'/'s.json'))==3 and (tmp_path/'new'/'s.png').exists() and 'ScheduleCallback' in r.stdout and 'hyper_loss' not in r.stderr

def test_on_the_digits(tmp_path):
    r = search('--epochs', 1, cwd=tmp_path)
    assert r.returncode==0, r.stderr[-2000:]
    for row in ('no augmentation','policy fixed at the start value','replayed schedule','797 test images'): assert row in r.stdout
    assert len(Schedule.load(tmp_path/'schedule.json'))==2

def test_refusals(pngs, tmp_path):
    (tmp_path/'empty').mkdir(); (tmp_path/'one'/'a').mkdir(parents=True)
    Image.new('RGB', (8,8)).save(tmp_path/'one'/'a'/'x.png')
    for args,match in ((['nowhere'],'is no folder'), (['empty'],'holds no images'), (['one'],'one sub-folder per class'), ([pngs,'--epochs',0],'needs 1 or more'), ([pngs,'--arch','resnet17x'],'resnet17x')):
        r = search(*args, cwd=tmp_path)
        assert r.returncode==1 and match in r.stderr and 'Traceback' not in r.stderr, (args, r.stderr[-1500:])
