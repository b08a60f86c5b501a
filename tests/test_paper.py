"The commands of the paper: two steps of every row, a run that is killed, settings as they are printed, errors in one sentence"
import itertools,json,math,os,signal,sys
from pathlib import Path
import numpy as np
import pytest, torch
from PIL import Image
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace

BENCHMARKS = Path(__file__).parents[1]/'benchmarks'
ROOMS = 'common','controls','figure4','images','models','paper','surcharge','tables'

sys.path.insert(0, str(BENCHMARKS))
try: import controls,figure4,images,models,paper,tables
finally:
    sys.path.remove(str(BENCHMARKS))
    for room in ROOMS: sys.modules.pop(room, None)

ROWS = {f'{t} {name}': row for t,(_,rows) in tables.TABLES.items() for name,row in rows.items()}
pytestmark = pytest.mark.filterwarnings('ignore:.*has no image of:UserWarning') # eight images are few
QUICK = '4 cifar10_wrn-40-2','6 hba'

@pytest.fixture(scope='module')
def out(tmp_path_factory): return tmp_path_factory.mktemp('out') # what two rows share is done once

@pytest.fixture(scope='module')
def imagenet(tmp_path_factory):
    "A folder like ImageNet's: 120 classes with an image each"
    root,noise = tmp_path_factory.mktemp('imagenet'),np.random.default_rng(0)
    for part,i in itertools.product(('train','val'), range(120)):
        f = root/part/f'n{i:03d}'/f'{part}_{i}.jpg'
        f.parent.mkdir(parents=True)
        Image.fromarray(noise.integers(0, 256, (40,50,3)).astype(np.uint8)).save(f)
    return str(root)


@pytest.mark.filterwarnings('ignore:The schedule was found beside:UserWarning') # ImageNet is cropped in another way at 224 pixels
@pytest.mark.parametrize('name', [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in ROWS])
def test_two_steps_of_a_row(name, out, imagenet, tmp_path):
    "The networks, images of the size and transforms of a full run, four images in a batch"
    row = ROWS[name]
    where = images.Where(imagenet if 'imagenet' in row.search else 'fake')
    paper.run(row, where, 'steps', [0], out, tmp_path)
    of = tables.of_row(row, tables.lines_of('steps', out))
    assert len(of['search'])==1 and len(of['training'])==(row.training is not None)
    for l in (*of['search'],*of['training']):
        assert all(math.isfinite(l[k]) for k in ('loss','error','seconds')) and l['images_seen']==8 and l['memory']>0
    s = tables.SEARCHES[row.search]
    schedule = Schedule.load(out/'schedules'/f"{row.search}_steps_0{'' if 'imagenet' in row.search else '_fake'}.json")
    assert schedule.progress[[0,-1]].tolist()==[0,1] and schedule.sigma==s.sigma
    assert (schedule.provenance['strategy'],schedule.provenance['hlr'])==(s.strategy,s.hlr)
    if s.schedule!='stn': assert (schedule.table[0]!=schedule.table[-1]).any() # there was a hyper-step; STN's waits for five epochs
    assert not any(tmp_path.iterdir())

SMALL = ['4 '+name for name in tables.TABLES['4'][1]]+['6 hba']

@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:The schedule was found beside:UserWarning')
@pytest.mark.parametrize('name', SMALL)
def test_two_steps_of_a_row_in_small(name, imagenet, tmp_path, monkeypatch):
    "The networks, precision and sizes of the small scale"
    monkeypatch.setattr(paper, 'scaled', lambda s, scale: s._replace(bs=4, n_train=8, n_valid=8*bool(s.n_valid), epochs=1, hlr=None))
    where = images.Where(imagenet if 'imagenet' in ROWS[name].search else 'fake')
    paper.run(ROWS[name], where, 'small', [0], tmp_path, tmp_path/'work')
    assert all(math.isfinite(l['loss']) and l['hlr' if l['part']=='search' else 'error'] for l in tables.lines_of('small', tmp_path))

# --- the settings

def test_the_rates_of_table_8_move_lambda_equally_far():
    "α' times the number of hyper-steps is 44 to 94, so that a slip in a column would show"
    far = [s.hlr*s.epochs*(s.n_train//s.bs)/2 for k,s in tables.TABLE8.items() if k!='stn']
    assert len(far)==7 and min(far)==pytest.approx(43.5, abs=0.1) and max(far)==pytest.approx(93.6, abs=0.1)

def test_table_2_is_a_part_of_table_10():
    (_,two),(_,ten) = tables.TABLES['2'],tables.TABLES['10']
    assert len(two)==10 and len(ten)==20 and two.items()<=ten.items()

def test_the_split_of_the_ablations():
    "Train30k, Val0 and Val are apart, and the training takes the first two"
    x = torch.arange(500)[:,None]
    sets = dict(train=(x,x[:,0]), test=(x,x[:,0]))
    s = tables.ablation('CIFAR-10', 'WRN-40-2')._replace(n_train=300, n_valid=100)
    train,val0,val = (set(y.tolist()) for _,y in images.split(sets, s, 3))
    both,again = (set(y.tolist()) for _,y in images.split(sets, s._replace(n_train=400, n_valid=0), 3))
    assert both==train|val0 and again==val and len(train|val0|val)==500

@pytest.mark.parametrize('name', ['10 cifar10_wrn-40-2_bn','3 reduced_cifar10'])
def test_a_schedule_is_replayed_on_the_split_that_it_was_found_on(name, tmp_path, monkeypatch):
    "No image by which a replay is judged was seen by its search"
    ablation,sets,fit = name[:2]=='10',[],paper.fit
    monkeypatch.setattr(paper, 'scaled', lambda s, scale: s._replace(bs=4, n_train=16 if s.n_valid or not ablation else 24, n_valid=8*bool(s.n_valid),
                                                                     epochs=1, hlr=None))
    def kept(learn, *args):
        sets.append([{tuple(x[:,0,:4].flatten().tolist()) for x in dl.dataset.x} for dl in learn.dls.loaders])
        return fit(learn, *args)
    monkeypatch.setattr(paper, 'fit', kept)
    paper.run(ROWS[name], images.Where('fake'), 'small', [0], tmp_path, tmp_path/'work')
    (train,val0,val),(again,judged) = sets
    assert judged==val and again==(train|val0 if ablation else train) and not (train|val0)&judged

def test_the_rate_of_imagenet_falls_at_epochs_90_180_and_240():
    rate = [paper.at_steps(0.1, e/270) for e in (0,89.9,90.01,179.9,180.01,239.9,240.01,269)]
    assert rate==pytest.approx([0.1,0.1,0.01,0.01,1e-3,1e-3,1e-4,1e-4])

def test_what_acts_behind_the_policy():
    "Cutout of 16 of 32 pixels, on SVHN of 20 and nothing else; the mean is that of the images"
    tfms = {k: [type(o).__name__ for o in images.transforms(tables.SEARCHES[k], [0.5]*3, [0.2]*3, 32)] for k in ('reduced_cifar10','reduced_svhn','stn')}
    assert tfms==dict(reduced_cifar10=['Normalize','FlipCrop','CutoutTfm'], reduced_svhn=['Normalize','CutoutTfm'], stn=['Normalize'])
    assert images.transforms(tables.SEARCHES['reduced_svhn'], [0.5]*3, [0.2]*3, 32)[-1].size*32==20

# --- networks

@pytest.mark.parametrize('name,millions', [('WRN-40-2',2.2), ('WRN-28-10',36.5), ('Shake-Shake (26 2x32d)',2.9), ('Shake-Shake (26 2x96d)',26.2),
                                           ('Shake-Shake (26 2x112d)',35.6), ('PyramidNet+ShakeDrop',26.2)])
def test_the_networks_have_the_published_number_of_parameters(name, millions):
    with torch.device('meta'): net = models.MODELS[name].full(10)
    assert sum(p.numel() for p in net.parameters())/1e6==pytest.approx(millions, abs=0.05)

def test_shake_is_mixed_by_other_numbers_forward_and_backward():
    x = torch.ones(2,1,1,1, requires_grad=True)
    y = models.Mixed.apply(x, torch.tensor([2.,3.]).view(2,1,1,1), torch.tensor([5.,7.]).view(2,1,1,1))
    y.sum().backward()
    assert y.flatten().tolist()==[2,3] and x.grad.flatten().tolist()==[5,7]

# --- a run that is killed

def killed(row, folder, part, epoch):
    "The exit status of a process that runs `row` and is killed behind an epoch of a part"
    pid = os.fork()
    if pid:
        return os.WTERMSIG(os.waitpid(pid, 0)[1])
    own = paper.Measured.after_epoch
    def after_epoch(self):
        own(self)
        if hasattr(self.learn, 'goes_on')==(part=='training') and self.epoch+1==epoch: os.kill(os.getpid(), signal.SIGKILL)
    paper.Measured.after_epoch = after_epoch
    try: paper.run(row, images.Where('fake'), 'small', [0], folder/'out', folder/'work')
    finally: os._exit(1)

def figures(folder):
    keys = 'part','seed','error','loss','valid_error','valid_loss','hlr','memory','images_seen'
    return [{k: l.get(k) for k in keys} for l in tables.lines_of('small', folder/'out')]

@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_a_killed_run_ends_with_the_same_figures(tmp_path, monkeypatch):
    "Killed in its search and in its training, and finished by a third process"
    row = ROWS['3 reduced_cifar10']
    monkeypatch.setattr(paper, 'scaled', lambda s, scale: s._replace(bs=4, n_train=16, n_valid=8*bool(s.n_valid), epochs=4, hlr=0.1))
    whole,cut = tmp_path/'whole',tmp_path/'cut'
    assert killed(row, cut, 'search', 2)==signal.SIGKILL and not (cut/'out').exists() and len([*(cut/'work').iterdir()])==1
    assert killed(row, cut, 'training', 3)==signal.SIGKILL and len(figures(cut))==1
    for folder in (cut,whole): paper.run(row, images.Where('fake'), 'small', [0], folder/'out', folder/'work')
    assert figures(cut)==figures(whole) and len(figures(cut))==2
    name = 'reduced_cifar10_small_0_fake.json'
    assert Schedule.load(cut/'out'/'schedules'/name)==Schedule.load(whole/'out'/'schedules'/name)
    before = (cut/'out'/'small.jsonl').read_bytes()
    paper.run(row, images.Where('fake'), 'small', [0], cut/'out', cut/'work')
    assert (cut/'out'/'small.jsonl').read_bytes()==before # what is finished is not done again

# --- the command

def command(monkeypatch, *words):
    monkeypatch.setattr(sys, 'argv', ['paper.py',*words])
    paper.main()

def test_list_names_every_row(monkeypatch, capsys):
    command(monkeypatch, '--list')
    said = capsys.readouterr().out
    assert all(f'--row {name.split()[1]} ' in said for name in ROWS)

@pytest.mark.parametrize('words,says', [
    (['--table','4'], '--table, --row and --data'), (['--table','4','--row','cifar10','--data','x'], "has no row 'cifar10': use one of cifar10_wrn-40-2"),
    (['--table','4','--row','cifar10_wrn-40-2','--data','/nowhere'], '/nowhere is no folder: give the one that holds CIFAR-10, or add --download'),
    (['--table','3','--row','reduced_svhn','--data','jpeg'], 'stands in for CIFAR-10, and this row needs SVHN'),
    (['--table','3','--row','reduced_svhn','--data','{here}'], 'SVHN-core is not in'),
    (['--table','3','--row','reduced_cifar10','--data','{here}'], 'CIFAR-10 is not in'),
    (['--table','3','--row','reduced_imagenet','--data','{here}'], 'no folder `train`')])
def test_errors_are_one_sentence(words, says, monkeypatch, tmp_path):
    (tmp_path/'data').mkdir()
    words = [w.format(here=tmp_path/'data') for w in (*words,'--out','{here}/../out','--work','{here}/..')]
    with pytest.raises(SystemExit) as e: command(monkeypatch, *words)
    assert says in e.value.code and '\n' not in e.value.code and not (tmp_path/'out').exists()

def test_ours_beside_the_published(tmp_path):
    "Two seeds on the data set itself are a part of a reproduction; CIFAR-10 as JPEG is none"
    line = lambda part,seed,data: dict(part=part, search='reduced_cifar10', training=None if part=='search' else 'cifar10_wrn-40-2', seed=seed, data=data,
                                       error=4.+seed, seconds=16. if part=='search' else 10., images_seen=100, memory=3., setting=dict(model='WRN-40-2'))
    row = lambda: next(l for l in tables.compared('4', tmp_path).splitlines() if '`cifar10_wrn-40-2`' in l)
    write = lambda scale,*lines: (tmp_path/f'{scale}.jsonl').write_text(''.join(json.dumps(l)+'\n' for l in lines))
    assert '| not yet; in full about 5 GPU hours |' in row() and '**3.80 ± 0.15**' in row()
    write('small', *[line(part, 0, 'CIFAR-10 as JPEG') for part in ('search','training')])
    assert 'searched 4.00 (n=1); replayed 4.00 (n=1) | 16 s; 3 MiB; 1.60 | in small;' in row()
    write('full', line('training', 0, 'CIFAR-10 as JPEG'))
    assert 'in full, on CIFAR-10 as JPEG' in row()
    write('full', line('training', 4, 'CIFAR-10 as JPEG'), *[line('training', i, 'CIFAR-10') for i in range(2)])
    assert 'replayed 4.50 ± 0.71 (n=2)' in row() and '**in full**, 2 of 5 seeds' in row() # what stands in is left out

def test_a_strategy_against_the_first_batch_norm(tmp_path):
    "Differences are taken seed by seed, and the interval says whether they are the paper's"
    def lines(strategy, errors, seconds):
        name = f'ablation_cifar10_wrn-40-2_{strategy}'
        name_of = dict(search=None, training=f'again_{name}')
        line = lambda part,i,e: dict(part=part, search=name, training=name_of[part], seed=i, error=e, seconds=seconds, memory=1., data='fake',
                                        setting=dict(model='WRN-40-2', n_train=30_000))
        return [line(part, i, e) for i,e in enumerate(errors) for part in ('search','training')]
    done = [*lines('first_bn', (30,32,31), 10.), *lines('conv', (29.9,31.95,30.9), 20.), *lines('bn', (33,35,34.1), 15.)]
    (tmp_path/'small.jsonl').write_text(''.join(json.dumps(l)+'\n' for l in done))
    said = tables.contrasts('10', folder=tmp_path)
    assert '| `cifar10_wrn-40-2_conv` | -0.08; 1.76 | -0.08 ± 0.07 (3) | 2.00 | 1.00 | ahead or behind as published |' in said
    assert '+3.03 ± 0.14 (3) | 1.50 | 1.00 | the other way round |' in said
    assert 'No differences yet' in tables.contrasts('5', folder=tmp_path)

def test_the_statements_of_figure_4():
    "A schedule as the paper draws it, and one that does all otherwise"
    space,pct = PBASpace(),torch.linspace(0, 1, 51)
    def schedule(p, m):
        at = torch.stack([torch.cat([p(t),m(t).expand(len(space)-space.n)]) for t in pct.tolist()])
        return Schedule(pct.tolist(), space.lo+(space.hi-space.lo)*at.double(), 1.)
    spread = torch.linspace(0.1, 0.5, space.n//2).repeat(2) # both copies of an operation alike
    theirs = schedule(lambda t: spread, lambda t: torch.tensor(0.1+0.4*min(t/0.2, 1)-0.1*max(t-0.2, 0)))
    other = schedule(lambda t: (spread if t<0.5 else spread.flip(0))**2, lambda t: torch.tensor(0.2+0.5*t))
    assert all(ok for _,ok in figure4.checked(theirs).values()) and not any(ok for _,ok in figure4.checked(other).values())

def test_a_random_schedule_has_the_same_strength():
    "At each point the same positions in the ranges, of probabilities and of magnitudes, at other operations"
    found = Schedule.load(BENCHMARKS/'results'/'schedules'/'wrn16_40ep_hba_seed0.json')
    n,sp = PBASpace().n,found.space
    of = lambda s: [part.sort(1).values for part in ((s.table-sp.lo)/(sp.hi-sp.lo)).split([n,len(sp)-n], 1)]
    dealt = controls.random_like(found, 0)
    assert all(torch.allclose(a, b, atol=1e-9) for a,b in zip(of(dealt), of(found))) and not torch.allclose(dealt.table, found.table, atol=1e-3)

def test_a_replay_without_its_schedule_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(controls, 'RESULTS', tmp_path)
    check = lambda arms,done: controls.check_schedules('wrn16', 200, arms, [0], done)
    with pytest.raises(SystemExit, match='schedule wrn16_200ep_hba_seed0.json is missing'): check(['hba','replay'], {('hba',0)})
    check(['hba','replay'], set()) # it will be searched first
    check(['hba','replay'], {('hba',0),('replay',0)})
