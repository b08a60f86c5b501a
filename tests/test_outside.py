"A schedule in programs without fastai. Worker processes import this file: so fastai and torchvision wait until a test needs them"
import copy,math,os,pickle,subprocess,sys
from unittest import mock
import pytest, torch
from hba_fastai.outside import stream_seed
from hba_fastai.pba import PBAPolicy
from hba_fastai.policy import Policy
from hba_fastai.schedule import Schedule,ScheduleError
from hba_fastai.space import TABLE7,PBASpace,Space
from torch import nn
from torch.utils.data import DataLoader,Dataset

SPACE = PBASpace()
END = torch.cat([torch.linspace(2, -8, 15).repeat(2),torch.zeros(24)]) # each operation with another probability
STRONG = Schedule([0,1], SPACE.values(torch.stack([torch.full((54,), -20.), END])), skip='Invert') # nothing at the start
N = 1000

class Noise(Policy):
    space,order = Space(noise=(0,0.2)),15
    def draw(self, v, generator): return v.noise*torch.rand(len(v), generator=generator, device=generator.device)
    def dose(self, drawn): return drawn[:,None]
    def apply(self, x, drawn, generator):
        return x + drawn[:,None,None,None]*torch.rand(x.shape, generator=generator, device=x.device)

BOTH = Schedule([0,1], torch.cat([torch.full((2,1), 0.1),STRONG.table], 1), spaces={'Noise': Noise.space, 'PBAPolicy': None})

def images(n=64, c=3, size=12): return (torch.rand(n, c, size, size, generator=torch.Generator().manual_seed(1))*255).byte()
def changed(a, b): return (a!=b).flatten(1).any(1)

# ---- the same as in fastai
def first_batch(schedule, pct, x, policy=None, norm=None):
    "The first batch of a fit with `ScheduleCallback` whose schedule stands at `pct`"
    from conftest import small_net,quiet
    from fastai.callback.all import ProgressCallback
    from fastai.callback.core import Callback,CancelFitException
    from fastai.data.transforms import Normalize
    from fastai.learner import Learner
    from hba_fastai.data import array_dls
    from hba_fastai.replay import ScheduleCallback
    class See(Callback):
        order = 100
        def before_batch(self): seen.append(self.x.as_subclass(torch.Tensor).clone()); raise CancelFitException
    seen,y = [],torch.zeros(len(x), dtype=torch.long)
    dls = array_dls((x,y), (x,y), bs=len(x), vocab=['a','b'], **({} if norm is None else dict(batch_tfms=Normalize.from_stats(norm, [1.]*3))))
    dls.train.shuffle = False
    learn = Learner(dls, small_net(x.shape[1], 2), loss_func=nn.CrossEntropyLoss()).remove_cb(ProgressCallback)
    learn.logger = quiet
    cb = ScheduleCallback(schedule, seed=7, policy=policy)
    cb.progress = lambda: pct
    learn.fit(1, cbs=[cb,See()])
    return seen[0]

@pytest.mark.parametrize('c,pct', [(3,1.),(3,0.4),(1,1.)])
@pytest.mark.filterwarnings('ignore:Color needs RGB')
def test_a_batch_is_that_of_ScheduleCallback_bit_for_bit(c, pct):
    x = images(c=c)
    fastai,t = first_batch(STRONG, pct, x),STRONG.transform(pct, seed=7)
    assert torch.equal(t(x/255), fastai) and torch.equal(STRONG.transform(pct, seed=7)(x)/255, fastai)
    assert 10<changed(fastai, x/255).sum()<64
    assert not torch.equal(t(x/255), fastai) # the next batch is another

def test_so_is_one_with_another_policy_and_with_the_mean_of_Normalize():
    x,mean = images(),torch.tensor([0.2,0.5,0.7])
    assert torch.equal(BOTH.transform(1., seed=7, policy=Noise())(x/255), first_batch(BOTH, 1., x, policy=Noise()))
    with_mean = STRONG.transform(1., seed=7, mean=mean)(x/255)
    normalized = first_batch(STRONG, 1., x, norm=mean.tolist())
    assert (with_mean-mean[:,None,None]-normalized).abs().max()<1e-6 # rounding of x - mean
    assert not torch.equal(with_mean, STRONG.transform(1., seed=7)(x/255))

def test_the_first_seed_is_torchs_own_as_there():
    torch.manual_seed(7)
    assert torch.equal(STRONG.transform(1.)(images()), STRONG.transform(1., seed=7)(images()))

# ---- the distribution
def drawn_by(f):
    "Codes of the operations (n,2) that `f` would have the policy carry out"
    ops = []
    def see(self, x, drawn, *args): ops.append(drawn.op); return x
    with mock.patch.object(PBAPolicy, 'apply', see): f()
    return torch.cat(ops)

def test_one_image_at_a_time_gets_each_operation_as_often_as_in_the_search():
    one,x = STRONG.torchvision(0.9, seed=1),images(1, size=4)[0]
    op = drawn_by(lambda: [one(x) for _ in range(N)])
    policy = PBAPolicy(skip='Invert')
    want = policy.expected(STRONG.lam(0.9), STRONG.sigma)[:15] # exact, twice at most in an image
    counts = torch.stack([(op==i).sum(1) for i in range(15)], 1).double()
    # Bernstein: 15 means of numbers in [0,2], each beyond its bound with a probability below 1e-7
    t = math.log(2/1e-7)
    bound = (2*counts.var(0)*t/N).sqrt() + 2*t/N
    assert ((counts.mean(0)-want).abs()<bound).all() and want[6]==0 and (op==6).sum()==0
    assert (want-want.flip(0)).abs().max()>bound.max() # it could see a difference

def test_its_mean_image_is_that_of_a_batch():
    x = images(1, size=6)[0]/255
    one,batch = STRONG.torchvision(1., seed=1, mean=0.5),STRONG.transform(1., seed=2, mean=0.5)
    a,b = torch.stack([one(x) for _ in range(N)]).flatten(1).double(),batch(x.expand(N, -1, -1, -1)).flatten(1).double()
    t = math.log(2*a.shape[1]/1e-7) # Bernstein for all numbers of the image, which are in [0,1]
    bound = sum((2*o.var(0)*t/N).sqrt() + t/N for o in (a,b))
    assert ((a.mean(0)-b.mean(0)).abs()<bound).all()
    assert (b.mean(0)-x.flatten()).abs().max()>bound.max() # it could see a difference

# ---- a module of torch
def test_only_training_changes_images_and_never_the_users_own():
    x = images()/255
    t,before = STRONG.transform(1., seed=0),x.clone()
    assert changed(t(x), x).any() and torch.equal(x, before)
    assert t.eval()(x) is x and t(x-5) is not None
    net = nn.Sequential(STRONG.transform(1., seed=0), nn.Flatten(), nn.Linear(432, 2)).eval()
    assert [*net.state_dict()]==['2.weight','2.bias'] and torch.equal(net(x), net[1:](x))

def test_the_progress_moves_what_is_drawn():
    t,x = STRONG.transform(0., seed=0),images()
    assert not changed(t(x), x).any()
    t.pct = 1
    assert changed(t(x), x).any() and t.pct==1 and 'pct=1' in repr(t)
    with pytest.raises(ScheduleError, match='for epoch 50 of 200'): t.pct = 50
    assert t.pct==1

def test_copies_pickles_and_half_precision_draw_the_same():
    t,x = STRONG.transform(1., seed=3),images()
    first = t(x)
    for again in (copy.deepcopy(t),pickle.loads(pickle.dumps(t)),nn.Sequential(STRONG.transform(1., seed=3)).half()[0]):
        assert torch.equal(again(x), first) and again.progress.is_shared()
        again.pct = 0
        assert t.pct==1 # a copy has its own

def test_autocast_around_it_changes_nothing():
    class Product(Noise):
        def apply(self, x, drawn, generator): return x@torch.eye(x.shape[-1])*(1-drawn)[:,None,None,None]
    t = Schedule([0.], torch.tensor([[0.1]]), spaces={'Product': Noise.space}).transform(0., seed=3, policy=Product())
    first = copy.deepcopy(t)(images()/255)
    with torch.autocast('cpu', dtype=torch.bfloat16): assert torch.equal(t(images()/255), first)

@pytest.mark.filterwarnings('ignore:Color needs RGB')
def test_types_come_back_and_what_cannot_be_augmented_is_refused():
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    one,x = STRONG.torchvision(1., seed=0),images(1)[0]
    pil = v2.functional.to_pil_image(x)
    for image in (x, x/255, tv_tensors.Image(x), pil, pil.convert('L'), images(2)):
        out = one(image)
        assert type(out) is type(image) and getattr(out, 'shape', 0)==getattr(image, 'shape', 0) and getattr(out, 'dtype', 0)==getattr(image, 'dtype', 0)
    assert type(STRONG.transform(1.)(tv_tensors.Image(images()))) is tv_tensors.Image
    refused = ((pil.convert('RGBA'),'mode RGBA'), (x.numpy(),'a ndarray'), (x.int(),'torch.int32: divide'), ([x],'a list'),
               (tv_tensors.Video(images(2)),'Each frame of a Video'))
    for wrong,says in refused:
        with pytest.raises(TypeError, match=says): one(wrong)
    with pytest.raises(ValueError, match='put it before the normalization'): STRONG.torchvision(1.)(x/255-1)
    with pytest.raises(TypeError, match='Noise needs float images in .0,1. and got torch.uint8'): BOTH.torchvision(1., policy=Noise())(pil)
    with pytest.raises(ScheduleError, match='Noise .noise. and only PBAPolicy are given'): BOTH.transform(0.)
    with pytest.raises(ValueError, match='mean colour has 3 numbers and these images have 1 channels'): STRONG.transform(1., mean=[0.1]*3)(images(c=1))

def test_masks_and_boxes_are_not_left_behind():
    from torchvision import tv_tensors
    from torchvision.transforms import v2
    x,mask = tv_tensors.Image(images(1)[0]),tv_tensors.Mask(torch.zeros(12, 12))
    with pytest.raises(ValueError, match="against its Mask: give `places='Mask'`"): v2.Compose([STRONG.torchvision(1.)])(x, dict(masks=mask))
    with pytest.warns(UserWarning, match='would shift images against their targets .Mask.'):
        op = drawn_by(lambda: STRONG.transform(1., places='Mask')(images(500)))
    assert set(op.unique().tolist()).isdisjoint([*range(5),list(TABLE7).index('Cutout')]) and (op>=0).any()
    with pytest.warns(UserWarning): image,target = v2.Compose([STRONG.torchvision(1., places='Mask')])(x, dict(masks=mask))
    assert type(image) is tv_tensors.Image and target['masks'] is mask

def test_a_hole_has_the_mean_colour_of_its_own_image():
    cut = SPACE.start({f'{o}_{c}.p': float(o=='Cutout') for o in TABLE7 for c in (0,1)}|{f'Cutout_{c}.m': 0.2 for c in (0,1)})
    one = Schedule([0.], SPACE.values(cut)[None], sigma=0.).torchvision(0., seed=0)
    ramp = torch.linspace(0, 1, 64).view(1,8,8).expand(3,-1,-1)
    for x in (ramp/2,1-ramp/2):
        new = torch.cat([o[(o-x).abs()>1/255] for o in [one(x) for _ in range(20)]]) # levels are whole numbers
        assert len(new) and ((new-x.mean()).abs()<1/255).all()

# ---- workers
class Images(Dataset):
    "Twice the same image in turn, so that what differs is what was drawn"
    def __init__(self, tfm): self.tfm = tfm
    def __len__(self): return 40
    def __getitem__(self, i): return self.tfm(torch.arange(3*64, dtype=torch.uint8).view(3,8,8))

def epoch(loader): return torch.cat([*loader])

def loader_of(tfm, workers=2, context='fork', seed=5, **kwargs):
    return DataLoader(Images(tfm), batch_size=10, num_workers=workers, multiprocessing_context=context, generator=torch.Generator().manual_seed(seed), **kwargs)

@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_workers_draw_differently_in_each_epoch_and_a_seed_reproduces_it():
    from torchvision.transforms import v2
    tfm = v2.Compose([STRONG.torchvision(1., seed=3)])
    tfm(images(1)[0]) # the main process has drawn before
    loader = loader_of(tfm)
    a,b = epoch(loader),epoch(loader)
    assert not torch.equal(a[:10], a[10:20]) and not torch.equal(a, b) # batches alternate between the two workers
    assert torch.equal(epoch(loader_of(tfm)), a)
    assert not torch.equal(epoch(loader_of(STRONG.torchvision(1., seed=4))), a)

@pytest.mark.parametrize('context', ['fork','spawn'])
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_the_progress_reaches_persistent_workers(context):
    tfm = STRONG.torchvision(0., seed=3)
    loader = loader_of(tfm, 1, context, persistent_workers=True)
    same = lambda x: (x==x[0]).flatten(1).all(1)
    assert same(epoch(loader)).all()
    tfm.pct = 1
    assert not same(epoch(loader)).all()

def test_processes_of_a_distributed_training_draw_differently():
    with mock.patch.dict(os.environ, RANK='1'): assert stream_seed(7)==8
    with mock.patch('torch.distributed.is_initialized', return_value=True),mock.patch('torch.distributed.get_rank', return_value=2): assert stream_seed(7)==9

# ---- imports
def test_plain_PyTorch_needs_neither_fastai_nor_pandas():
    code = """import sys,torch
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace
schedule = Schedule([0.], PBASpace().values(torch.zeros(1,54)))
alien = lambda: {'fastai','fasttransform','pandas','matplotlib','torchvision','PIL'} & set(sys.modules)
for t in (schedule.transform(0.),schedule.torchvision(0.)): assert t(torch.rand(4,3,8,8)).shape==(4,3,8,8)
assert not alien(), alien()"""
    r = subprocess.run([sys.executable,'-W','ignore','-c',code], capture_output=True, text=True)
    assert r.returncode==0, r.stderr
