"Masks, points and boxes go where the pixels of their image go"
import numpy as np, pytest, torch
from PIL import Image
from fastai.data.all import DataBlock,IndexSplitter
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.torch_core import TensorMultiCategory,set_seed
from fastai.vision.all import BBoxBlock,BBoxLblBlock,ImageBlock,MaskBlock,PILImage,PointBlock,ProgressCallback
from fastai.vision.core import TensorBBox,TensorImage,TensorMask,TensorPoint
from hypothesis import given,settings,strategies as st
from torch import Tensor,nn
from conftest import quiet,small_net
from hba_fastai.ops import OP,OP_NAMES
from hba_fastai.pba import Draw,PBAPolicy
from hba_fastai.places import move_boxes,move_masks,move_points
from hba_fastai.policy import Data,Policy
from hba_fastai.replay import PolicyCallback,ScheduleCallback
from hba_fastai.schedule import Schedule
from hba_fastai.search import HBACallback
from hba_fastai.search_free import AutoAugment,RandAugment,TrivialAugmentWide
from hba_fastai.space import GEOMETRIC,PBASpace,Space,TABLE7
from hba_fastai.transform import PolicyTransform,policy_in,seen_data

SIZES = [(32,32),(61,47)]
FILL = 77

def pillow(name, im, m):
    "Pillow's nearest pixel"
    w,h = im.size
    if name=='Rotate': return im.rotate(m, Image.NEAREST, fillcolor=FILL)
    coef = {'ShearX': (1,m,0,0,1,0), 'ShearY': (1,0,0,m,1,0), 'TranslateX': (1,0,m*w,0,1,0), 'TranslateY': (1,0,0,0,1,m*h)}
    return im.transform(im.size, Image.AFFINE, coef[name], Image.NEAREST, fillcolor=FILL) if name in coef else im

def some_masks(n, h, w): return torch.randint(0, 70, (n,h,w), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

def magnitudes(names, seed=1):
    "One magnitude, of either sign, for each name"
    u = np.random.default_rng(seed).uniform(-1, 1, len(names))
    return torch.tensor([v*TABLE7[o][1] if o in GEOMETRIC else 0. for v,o in zip(u, names)], dtype=torch.float32)

def codes(names): return torch.tensor([OP[o] for o in names])

def check_against_pillow(v, chains, dtype):
    "Masks `v` under `chains`, a list of names for each"
    op = torch.stack([codes(c) for c in chains])
    m = torch.stack([magnitudes(c, i) for i,c in enumerate(chains)])
    ours = move_masks(v.to(dtype), op, m, tuple(v.shape[1:]), FILL)
    assert ours.dtype==dtype and not torch.equal(ours.byte(), v)
    for i,chain in enumerate(chains):
        im = Image.fromarray(v[i].numpy())
        for o,k in zip(chain, m[i].tolist()): im = pillow(o, im, k)
        assert np.array_equal(ours[i].byte().numpy(), np.array(im)), chain

@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('name', GEOMETRIC)
def test_masks_equal_pillow(name, size): check_against_pillow(some_masks(20, *size), [[name]]*20, torch.uint8)

@pytest.mark.parametrize('dtype', [torch.uint8,torch.int64,torch.float32])
def test_chains_of_two_equal_pillow(dtype):
    "All ordered pairs, photometric operations and Cutout among them, which leave a mask"
    names = GEOMETRIC+['Invert','Cutout','Color']
    chains = [[a,b] for a in names for b in names]
    check_against_pillow(some_masks(len(chains), 33, 21), chains, dtype)

def test_masks_with_channels_and_an_accelerators_way():
    "(B,C,H,W) is as its channels are; what an accelerator does (all masks at once) is what a CPU does"
    v = some_masks(30, 17, 23)
    op,m = torch.randint(-1, 15, (30,2), generator=torch.Generator().manual_seed(0)),torch.full((30,2), 0.2)
    alone = move_masks(v, op, m, (17,23))
    assert torch.equal(move_masks(torch.stack([v,v], 1), op, m, (17,23)), torch.stack([alone,alone], 1))
    class Elsewhere(Tensor):
        device = property(lambda self: torch.device('meta'))
    with torch._C.DisableTorchFunctionSubclass():
        assert torch.equal(move_masks(v.as_subclass(Elsewhere), op, m, (17,23)).as_subclass(Tensor), alone)

def drawn(name, m, n=1): return torch.full((n,1), OP[name]),torch.full((n,1), float(m))

def test_smaller_masks_see_the_same_view():
    "A mask of half the size moves by half as many pixels, also where height and width shrink differently"
    op,m = torch.tensor([[OP['ShearX'],OP['TranslateY']]]),torch.tensor([[0.25,0.25]])
    big = torch.zeros(1,32,32); big[:,8:24,8:24] = 1
    new,small = move_masks(big, op, m, (32,32)),move_masks(big[:,::2,::4], op, m, (32,32))
    whole = new.unfold(1,2,2).unfold(2,4,4).flatten(3) # the 8 large pixels of a small one: all the same, but at an edge
    sure = whole.amin(3)==whole.amax(3)
    assert sure.float().mean()>0.7 and torch.equal(small[sure], whole[...,0][sure])

@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 2**31), st.booleans(), st.sampled_from([PBAPolicy,TrivialAugmentWide,RandAugment,AutoAugment]))
def test_a_mask_of_what_is_in_the_image_stays_one(seed, on_bytes, make):
    "Whatever geometric operations a policy draws, and in what order: a mask that says where the image is bright goes on to say so"
    g = torch.Generator().manual_seed(seed)
    policy = make(fill=0.).bind(Data(3, None, 'TensorMask'))
    x = (torch.rand(6, 1, 13, 19, generator=g)>0.5).float().expand(-1,3,-1,-1)
    lam = policy.space.start(0.3).expand(6,-1) if len(policy.space) else torch.zeros(6,0)
    d = policy.draw_under(lam, g)
    d = d._replace(op=torch.where(d.op<len(GEOMETRIC), d.op, -1))
    images = policy.apply((x*255).byte() if on_bytes else x.clone(), d)
    assert torch.equal(policy.on_masks(x[:,0].long(), d, (13,19)), (images[:,0]>0).long())

@pytest.mark.parametrize('name', GEOMETRIC)
@pytest.mark.parametrize('size', SIZES)
def test_a_dot_is_where_its_point_says(name, size, n=40):
    "Dots of 3x3 pixels: their middle is within one pixel of the point, as each pixel is the nearest one"
    (h,w),rng = size,np.random.default_rng(0)
    x,y = rng.integers(w//3, 2*w//3, n),rng.integers(h//3, 2*h//3, n)
    mask = torch.zeros(n, h, w)
    for i in range(n): mask[i,y[i]-1:y[i]+2,x[i]-1:x[i]+2] = 1
    scale = torch.tensor([w,h])/2
    p = (torch.tensor(np.stack([x,y], 1)).float()+0.5)[:,None]/scale - 1 # pixel i is from i to i+1, as `PointScaler` counts
    op,m = codes([name]*n)[:,None],magnitudes([name]*n)[:,None]/(2 if 'Translate' in name else 1) # no dot leaves the image
    new,q = move_masks(mask, op, m, size),(move_points(p, op, m, size)+1)*scale
    for i in range(n):
        at = new[i].nonzero().flip(1).float().mean(0)+0.5
        assert (at-q[i,0]).abs().max()<1, (name,m[i],at,q[i,0])

def test_points_of_a_chain_and_of_none():
    "Two operations are one after the other; what was not moved stays bit for bit; shapes and types stay"
    g = torch.Generator().manual_seed(0)
    p,size = torch.rand(5, 3, 2, generator=g)*2-1,(10,14)
    op,m = torch.randint(0, 5, (5,2), generator=g),torch.rand(5, 2, generator=g)*0.3
    both = move_points(p, op, m, size)
    one = move_points(move_points(p, op[:,:1], m[:,:1], size), op[:,1:], m[:,1:], size)
    assert (both-one).abs().max()<1e-6 and both.dtype==p.dtype
    assert torch.equal(move_points(p, torch.full_like(op, OP['Cutout']), m, size), p)
    assert move_points(p[:0], op[:0], m[:0], size).shape==p[:0].shape
    assert torch.equal(move_points(p[:,0], op, m, size), both[:,0])
    assert move_points(p[:,:0], op, m, size).shape==(5,0,2)

def test_boxes_go_around_their_corners():
    "A square turned by 45° becomes one that is √2 times as wide, and what reaches over the edge is cut off"
    box = torch.tensor([[[-0.5,-0.5,0.5,0.5],[0.2,0.2,1.,1.],[0,0,0,0]]])
    new,gone = move_boxes(box, lambda p: move_points(p, *drawn('Rotate', 45), (20,20)))
    r = 0.5**0.5
    assert (new[0,0]-torch.tensor([-r,-r,r,r])).abs().max()<1e-6
    assert new.abs().max()<=1 and torch.equal(new[0,2], torch.zeros(4)) and not gone.any()

@pytest.mark.parametrize('make', [PBAPolicy,TrivialAugmentWide,RandAugment,AutoAugment])
def test_policies_say_what_falls_outside(make):
    policy = make(fill=0.5, mask_fill=-100).bind(Data(3))
    d = Draw(*drawn('TranslateX', 1000 if make is TrivialAugmentWide else 1), torch.zeros(1,1), torch.zeros(1,1,2))
    assert policy.on_masks(some_masks(1, 8, 8), d, (8,8)).eq(-100).all()
    with pytest.raises(TypeError, match='mask_fill=0.5 is a float'): make(mask_fill=0.5)

# --- in batches
def transform(policy, **kwargs): return PolicyTransform(policy, lambda: policy.space.start(0.5), 0., torch.Generator().manual_seed(0), **kwargs)

class ToLeft(Policy):
    "Each image moves to the left by its own share of the width"
    space = Space(by=(0,1))
    def draw(self, v, generator): return torch.linspace(0, 1, len(v))
    def dose(self, drawn): return drawn[:,None]
    def apply(self, x, drawn, generator): return x
    def on_points(self, p, drawn, size): return p-2*drawn.view(-1,*[1]*(p.dim()-1))*torch.tensor([1,0])

def test_labels_stay_with_their_boxes():
    "Boxes that leave the image become padding with label 0; labels of others, and of padding, stay; other labels stay whole"
    box = TensorBBox(torch.tensor([[[-0.9,0,-0.1,0.5],[0.5,0,0.9,0.5],[0,0,0,0]]]*3))
    lbl,other = TensorMultiCategory(torch.tensor([[4,5,6]]*3)),TensorMultiCategory(torch.tensor([[1,1],[1,0],[0,1]]))
    x = TensorImage(torch.rand(3,3,8,8))
    _,b,y,z = transform(ToLeft())((x,box,lbl,other), split_idx=0)
    assert isinstance(b, TensorBBox) and isinstance(y, TensorMultiCategory)
    assert y.tolist()==[[4,5,6],[0,5,6],[0,0,6]] and torch.equal(z.as_subclass(Tensor), other.as_subclass(Tensor))
    assert (b==0).all(2).tolist()==[[False,False,True],[True,False,True],[True,True,True]]
    one = TensorMultiCategory(torch.ones(3,3).long())
    assert torch.equal(transform(ToLeft())((x,one), split_idx=0)[1].as_subclass(Tensor), torch.ones(3,3).long()) # no boxes

def test_sample_i_keeps_its_mask_and_points():
    "In one batch: each of two masks, an input and a target, is moved by the operations of its own image; types stay"
    v = some_masks(50, 12, 12)
    x = TensorImage((v[:,None]/255).expand(-1,3,-1,-1).contiguous())
    p = TensorPoint(torch.rand(50,2,2)-0.5)
    policy = PBAPolicy(0., skip=[o for o in OP_NAMES if o not in GEOMETRIC+['Cutout']])
    tfm = transform(policy, n_inp=2)
    xb,a,b,q = tfm((x,TensorMask(v),TensorMask(v.long()),p), split_idx=0)
    assert [type(o) for o in (xb,a,b,q)]==[TensorImage,TensorMask,TensorMask,TensorPoint]
    d = tfm.drawn
    only = d._replace(op=torch.where(d.op<len(GEOMETRIC), d.op, -1))
    assert torch.equal(a.as_subclass(Tensor), (policy.apply(v[:,None].expand(-1,3,-1,-1), only)[:,0])) # without the holes of Cutout
    assert torch.equal(a.as_subclass(Tensor), b.as_subclass(Tensor).byte()) and (d.op==OP['Cutout']).any()
    assert torch.equal(q.as_subclass(Tensor), move_points(p.as_subclass(Tensor), d.op, d.m, (12,12)))
    same = (only.op<0).all(1)
    assert torch.equal(a[same].as_subclass(Tensor), v[same]) and not torch.equal(a.as_subclass(Tensor), v)

def test_a_policy_that_says_nothing_leaves_them():
    class Noise(ToLeft): on_points = Policy.on_points
    p,y,x = TensorPoint(torch.rand(4,2,2)),TensorMask(some_masks(4, 8, 8)),TensorImage(torch.rand(4,3,8,8))
    _,a,b = transform(Noise())((x,y,p), split_idx=0)
    assert torch.equal(a.as_subclass(Tensor), y.as_subclass(Tensor)) and torch.equal(b.as_subclass(Tensor), p.as_subclass(Tensor))

# --- in a fit
def picture(i, size=32):
    "A bright disc on noise, as large as its number says"
    rng = np.random.default_rng(i)
    y,x = np.mgrid[:size,:size]
    cx,cy = rng.integers(8, size-8, 2)
    inside = (x-cx)**2+(y-cy)**2 < (4+i%4)**2
    level = rng.integers(0, 80, (size,size,1))+150*inside[...,None]
    return np.repeat(level, 3, 2).astype(np.uint8),inside.astype(np.uint8)

def masks_learner(loss=None, bs=8, n=24, **kw):
    set_seed(0)
    block = DataBlock((ImageBlock,MaskBlock(['back','disc'])), get_x=lambda i: PILImage.create(picture(i)[0]), get_y=lambda i: picture(i)[1],
                      splitter=IndexSplitter(range(8)))
    net = nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,2,1))
    learn = Learner(block.dataloaders(range(n), bs=bs, num_workers=0), net, loss_func=loss or CrossEntropyLossFlat(axis=1), **kw)
    learn.logger = quiet
    return learn.remove_cb(ProgressCallback)

def seen_by(learn):
    "(images, masks) that reach the network in training"
    from fastai.callback.core import Callback
    seen = []
    class See(Callback):
        order = 60
        def before_batch(self):
            if self.training: seen.append((self.x.as_subclass(Tensor).clone(),self.y.as_subclass(Tensor).clone()))
    return See(),seen

def half_schedule(): return Schedule([0,1], PBASpace().values(torch.stack([PBASpace().start(0.5)]*2)))

ONLY = [o for o in OP_NAMES if o not in GEOMETRIC]
IN_A_FIT = dict(search=lambda: HBACallback(seed=0, start=0.5, policy=PBAPolicy(0., skip=ONLY, mask_fill=9)),
                replay=lambda: ScheduleCallback(half_schedule(), seed=0, policy=PBAPolicy(0., skip=ONLY, mask_fill=9)),
                policy=lambda: PolicyCallback(PBAPolicy(0., skip=ONLY, mask_fill=9), seed=0),
                bilinear=lambda: PolicyCallback(PBAPolicy(0., bilinear=True, skip=ONLY, mask_fill=9), seed=0))

@pytest.mark.parametrize('kind', IN_A_FIT)
def test_in_a_fit_masks_match_their_images(kind):
    "In a search and in replays, on bytes: holes of images and of masks are the same pixels, and the disc is where its mask says"
    learn = masks_learner(loss=CrossEntropyLossFlat(axis=1, ignore_index=9))
    see,seen = seen_by(learn)
    cb = IN_A_FIT[kind]()
    learn.fit(2, cbs=[cb,see])
    x,y = (torch.cat(o) for o in zip(*seen))
    x,hole = (x[:,0]*255).round(),y==9
    assert hole.any() and not hole[:,16,16].all()
    wrong = (x[hole]!=0).float().mean(),((x>115).long()!=y)[~hole].float().mean() # noise is below 80, the disc at 150 and more
    assert max(wrong)==0 if kind!='bilinear' else max(wrong)<0.1 # which mixes pixels on both sides of an edge
    if kind=='search': assert cb.inactive==[] and not torch.equal(cb.schedule.table[0], cb.schedule.table[-1])

@pytest.mark.parametrize('policy', [TrivialAugmentWide,RandAugment,AutoAugment])
def test_search_free_policies_take_masks(policy):
    learn = masks_learner()
    see,seen = seen_by(learn)
    learn.fit(1, cbs=[PolicyCallback(policy(), seed=0),see])
    assert all(set(y.unique().tolist())<={0,1} for _,y in seen)

def test_targets_that_are_images_are_still_shifted_by_nothing():
    block = DataBlock((ImageBlock,ImageBlock), get_x=lambda i: PILImage.create(picture(i)[0]), get_y=lambda i: PILImage.create(picture(i)[0]),
                      splitter=IndexSplitter(range(8)))
    data,_ = seen_data(block.dataloaders(range(16), bs=8, num_workers=0))
    assert (data.places,data.fixed)==('TensorImage','TensorImage')
    with pytest.warns(UserWarning, match='would shift images against their targets .TensorImage.: they are left out'): PBAPolicy().bind(data)
    with pytest.raises(ValueError, match='would shift images against their targets .TensorImage.'): TrivialAugmentWide().bind(data)

def test_a_search_steered_by_other_masks():
    "`valid=` is a loader with masks of its own, and the response reaches a loss per pixel"
    learn,other = masks_learner(),masks_learner(n=16)
    cb = HBACallback(valid=other.dls.valid, seed=0, warmup=0.)
    learn.fit(3, cbs=cb)
    g = cb.lam.gradients()
    assert g.isfinite().all() and (g!=0).any(0)[:10].any() # of probabilities of geometric operations
    assert cb.schedule.skip==[] and cb.inactive==[]

def test_masks_join_late_under_the_same_operations():
    "Target images in training bring masks that moved with them"
    learn,other = masks_learner(CrossEntropyLossFlat(axis=1, ignore_index=9)),masks_learner(n=16)
    see,seen = seen_by(learn)
    policy = PBAPolicy(0., skip=ONLY, mask_fill=9)
    learn.fit(3, cbs=[PolicyCallback(policy, target=other.dls.valid, until=0.3, seed=0),see])
    x,y = (torch.cat(o) for o in zip(*seen))
    assert ((x[:,0]*255>115).long()==y)[y!=9].all()

def test_boxes_of_a_data_block():
    "Through `BBoxBlock`, `bb_pad` and `show_batch`"
    import matplotlib.pyplot as plt
    set_seed(0)
    block = DataBlock((ImageBlock,BBoxBlock,BBoxLblBlock), n_inp=1, get_x=lambda i: PILImage.create(picture(i)[0]),
                      get_y=[lambda i: [[2,3,9,9]]*(1+i%2),lambda i: ['it']*(1+i%2)], splitter=IndexSplitter(range(8)))
    dls = block.dataloaders(range(24), bs=8, num_workers=0)
    policy = PBAPolicy(0., skip=ONLY)
    with policy_in(dls, policy, lambda: policy.space.start(0.5), 1., torch.Generator().manual_seed(0)) as tfm:
        _,b,y = dls.train.one_batch()
        dls.train.show_batch(max_n=4)
        plt.close('all')
    assert b.shape==(8,2,4) and ((b==0).all(2)==(y==0)).all() and len(b.unique(dim=0))>3

def test_points_on_a_small_net_in_a_search():
    set_seed(0)
    block = DataBlock((ImageBlock,PointBlock), get_x=lambda i: PILImage.create(picture(i)[0]), get_y=lambda i: torch.tensor([[8.,9.]]),
                      splitter=IndexSplitter(range(8)))
    learn = Learner(block.dataloaders(range(24), bs=8, num_workers=0), small_net(n=2))
    learn.logger = quiet
    cb = HBACallback(seed=0, start=0.5)
    learn.remove_cb(ProgressCallback).fit(2, cbs=cb)
    assert cb.inactive==[] and cb.lam.gradients().isfinite().all()
