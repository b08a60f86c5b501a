"AutoAugment, RandAugment and TrivialAugmentWide against torchvision's own tables, draws and images"
import math,random
import numpy as np, pytest, torch
from fastai.torch_core import set_seed
from conftest import small_learner
from fastai.vision.augment import Normalize
from hba_fastai.all import AutoAugment,HBACallback,PBAPolicy,PolicyCallback,RandAugment,TrivialAugmentWide,digits_dls
from hba_fastai.ops import OP,OP_NAMES
from hba_fastai.policy import Data
from hba_fastai.search_free import CHOICES,SearchFree
from scipy.stats import chi2
from torchvision.transforms import InterpolationMode,autoaugment as theirs
from torchvision.transforms.functional import pil_to_tensor,to_pil_image

POLICIES = {'auto': lambda **kw: AutoAugment('cifar10', **kw), 'rand': lambda **kw: RandAugment(**kw), 'trivial': TrivialAugmentWide}
DATA_SETS = ['imagenet','cifar10','svhn']
SHIFTS = 'TranslateX','TranslateY'
SIZE = 24,32 # height and width

@pytest.fixture(params=POLICIES)
def make(request): return POLICIES[request.param]

def gen(seed=0): return torch.Generator().manual_seed(seed)
def drawn(policy, n, seed=0): return policy.draw_under(torch.zeros(n,0), gen(seed))
def images(n, h=SIZE[0], w=SIZE[1], c=3): return torch.randint(0, 256, (n,c,h,w), dtype=torch.uint8, generator=gen(9))
def name_of(code): return 'Identity' if code<0 else OP_NAMES[code]

def space_of(policy):
    "torchvision's `{operation: (magnitudes, signed)}` for images of `SIZE`"
    if isinstance(policy, TrivialAugmentWide): return theirs.TrivialAugmentWide()._augmentation_space(31)
    if isinstance(policy, RandAugment): return theirs.RandAugment()._augmentation_space(31, SIZE)
    return theirs.AutoAugment()._augmentation_space(10, SIZE)

def ours_of(o, m):
    "torchvision's magnitude in the units of `apply_ops`"
    if o in SHIFTS: return -int(m)/SIZE[o=='TranslateX']
    if o in ('Brightness','Color','Contrast','Sharpness'): return 1+m
    return {'Posterize': 8-m, 'Solarize': 256-m}.get(o, m)

def chi_square(counts, p):
    "Raise where counts (k,) under probabilities (k,) have a χ² that chance exceeds once in a million times; `p` 0 must have none"
    counts,p = torch.as_tensor(counts).double(),torch.as_tensor(p).double()
    assert (counts[p==0]==0).all()
    e = p[p>0]*counts.sum()
    assert abs(p.sum()-1)<1e-6 and e.min()>5 and counts.sum()==counts[p>0].sum()
    assert len(e)==1 or ((counts[p>0]-e)**2/e).sum() < chi2.isf(1e-6, len(e)-1)

def joint(*columns):
    "Counts of combinations `{(a, b, ...): n}`"
    rows,n = torch.stack(columns, -1).flatten(0, -2).unique(dim=0, return_counts=True)
    return {tuple(r): c for r,c in zip(rows.tolist(),n.tolist())}

# --- tables

def test_choices_are_torchvisions():
    assert sorted(map(name_of, CHOICES)) == sorted(space_of(RandAugment())) == sorted(space_of(TrivialAugmentWide()))

@pytest.mark.parametrize('data_set', DATA_SETS)
def test_pairs_are_torchvisions(data_set):
    policy = AutoAugment(data_set)
    want = theirs.AutoAugment(theirs.AutoAugmentPolicy(data_set)).policies
    flat = lambda i: [[part[i] for part in pair] for pair in want]
    assert [[name_of(o) for o in pair] for pair in policy.op.tolist()]==flat(0)
    assert torch.equal(policy.p, torch.tensor(flat(1)))
    assert policy.level.tolist()==[[m or 0 for m in pair] for pair in flat(2)]

def test_magnitudes_are_torchvisions(make):
    "Each bin of each operation, in both directions, after the shifts became whole pixels; equal in float32, in which `apply_ops` takes them"
    policy = make()
    for o,(magnitudes,signed) in space_of(policy).items():
        for level,m in enumerate(magnitudes.tolist() if magnitudes.dim() else []):
            for coin,sign in ((0.,1),(0.7,-1 if signed else 1)):
                op = torch.tensor([[OP[o]]])
                got = policy.whole_shifts(policy.at_levels(op, level, torch.tensor([[coin]])), *SIZE)
                if o in SHIFTS: sign = -sign # ours goes the other way, both as likely
                assert got.item()==torch.tensor(float(ours_of(o, sign*m))).item(), (o,level,sign)

@pytest.mark.parametrize('make', ['auto','rand'])
def test_whole_pixels_at_any_size(make):
    "Shifts of AutoAugment and RandAugment are torchvision's at each size up to 1000, but multiples of 331: whole pixels, which float32 may miss by one"
    policy,n = POLICIES[make](),10 if make=='auto' else 31
    op = torch.full((n,1), OP['TranslateX'])
    d = policy.at_levels(op, torch.arange(n)[:,None], torch.zeros(n,1))
    for w in range(1, 1001):
        got = (policy.whole_shifts(d, 7, w).double()*w).round().flatten().tolist()
        want = [int(o) for o in torch.linspace(0., 150/331*w, n).tolist()]
        assert all(abs(a-b)<=(w%331==0) for a,b in zip(got, want))

# --- draws

def test_trivial_draws_all_bins_alike(n=100_000):
    policy = TrivialAugmentWide()
    d = drawn(policy, n)
    assert d.op.shape==(n,1)
    chi_square([(d.op==o).sum() for o in CHOICES], [1/14]*14)
    for o,(magnitudes,signed) in space_of(policy).items():
        if not magnitudes.dim(): continue
        m = d.m[d.op==OP[o]]
        values,place = policy.magnitudes[OP[o]].flatten().unique(return_inverse=True)
        chi_square([(m==v).sum() for v in values], place.bincount()/62)
        assert len(values)==(61 if signed else 7 if o=='Posterize' else 31)

def test_rand_draws_pairs_at_one_magnitude(n=100_000):
    policy = RandAugment(2, 7)
    d = drawn(policy, n)
    count = joint(d.op[:,0], d.op[:,1])
    chi_square([count.get((a,b), 0) for a in CHOICES for b in CHOICES], [1/196]*196) # with repetition, and one slot does not know of the other
    for o,(magnitudes,signed) in space_of(policy).items():
        if o=='Identity': continue
        m = d.m[d.op==OP[o]]
        values,place = policy.magnitudes[OP[o],7].unique(return_inverse=True)
        chi_square([(m==v).sum() for v in values], place.bincount()/2)
        assert len(values)==1+signed

@pytest.mark.parametrize('data_set', DATA_SETS)
def test_auto_draws_pairs_with_their_probabilities(data_set, n=100_000):
    policy = AutoAugment(data_set)
    d,want = drawn(policy, n),{}
    for pair in theirs.AutoAugment(theirs.AutoAugmentPolicy(data_set)).policies:
        for on in ((0,0),(0,1),(1,0),(1,1)): # which of both are applied
            key = tuple(OP[o] if b else -1 for (o,*_),b in zip(pair, on))
            want[key] = want.get(key, 0) + math.prod(p if b else 1-p for (_,p,_),b in zip(pair, on))/25
    count = joint(*d.op.unbind(1))
    assert set(count)<=set(want)
    chi_square([count.get(k, 0) for k in want], list(want.values()))

@pytest.mark.parametrize('data_set', DATA_SETS)
def test_auto_draws_the_magnitudes_of_its_pairs(data_set, n=100_000):
    policy = AutoAugment(data_set)
    d,want,table = drawn(policy, n),{},space_of(AutoAugment())
    for o,p,level in (part for pair in theirs.AutoAugment(theirs.AutoAugmentPolicy(data_set)).policies for part in pair):
        for direction in (0,1):
            m = policy.magnitudes[OP[o],level or 0,direction].item()
            assert (policy.magnitudes[OP[o],level or 0].unique().numel()==2) == (table[o][1] and level!=0)
            want[OP[o],m] = want.get((OP[o],m), 0) + p/2
    count = joint(d.op.double(), d.m.double())
    total = sum(want.values())
    assert {k for k in count if k[0]>=0}=={k for k,p in want.items() if p}
    chi_square([count.get(k, 0) for k in want], [p/total for p in want.values()])

def test_directions_do_not_depend_on_operations(n=50_000):
    d = drawn(RandAugment(2, 9), n)
    both = (d.op[:,0]==OP['Rotate']) & (d.op[:,1]==OP['Rotate'])
    signs = joint(*d.m[both].sign().unbind(1))
    chi_square([signs.get((a,b), 0) for a in (-1.,1.) for b in (-1.,1.)], [1/4]*4)

def test_one_source_of_randomness(make):
    "The same generator, the same draw; nothing of the global ones; no sample depends on how many there are behind it"
    policy = make()
    before = random.getstate(),str(np.random.get_state()),torch.get_rng_state()
    a,b,c,few = drawn(policy, 64),drawn(policy, 64),drawn(policy, 64, seed=1),drawn(policy, 5)
    after = random.getstate(),str(np.random.get_state()),torch.get_rng_state()
    assert before[:2]==after[:2] and torch.equal(before[2], after[2])
    for s,t,u in zip(a, b, few): assert torch.equal(s, t) and torch.equal(s[:5], u)
    assert not torch.equal(a.op, c.op)

# --- images

def pil(v, o, m):
    "torchvision's operation; AutoContrast in whole numbers, where Pillow's fractions miss a level now and then"
    y = pil_to_tensor(theirs._apply_op(to_pil_image(v), o, m, InterpolationMode.NEAREST, None))
    if o!='AutoContrast': return y
    lo,hi = (f(v.long(), (1,2), keepdim=True) for f in (torch.amin,torch.amax))
    exact = torch.where(hi>lo, (v-lo)*255//(hi-lo).clamp(min=1), v)
    assert ((exact-y==0) | (exact-y==1)).all()
    return exact.byte()

def test_images_are_torchvisions(make):
    "Each operation at each bin, in both directions, bit for bit as torchvision on a Pillow image, fill 0"
    policy,x = make(fill=0.),images(1)
    for o,(magnitudes,signed) in space_of(policy).items():
        if o=='Identity': continue
        op = torch.tensor([[OP[o]]])
        for level,m in enumerate(magnitudes.tolist() if magnitudes.dim() else [0.]):
            for coin,sign in ((0.,1),(0.7,-1))[:1+signed]:
                y = policy.apply(x, policy.at_levels(op, level, torch.tensor([[coin]])))
                want = pil(x[0], o, sign*m*(-1 if o in SHIFTS else 1))
                assert torch.equal(y[0], want), (o,level,sign)

@pytest.mark.parametrize('slots', [1,2,5])
def test_slots_one_after_another(slots, n=64):
    "Bytes and floats, packed and dense, as torchvision does one image and one operation after another"
    policy,x = RandAugment(slots, 9, fill=0.),images(n)
    d = drawn(policy, n)
    pixels = policy.whole_shifts(d, *SIZE)
    want = []
    for v,ops,ms in zip(x, d.op.tolist(), pixels.tolist()):
        for o,m in zip(map(name_of, ops), ms):
            size = SIZE[o=='TranslateX']
            their_m = {'TranslateX': -round(m*size), 'TranslateY': -round(m*size), 'Solarize': 256-m, 'Posterize': 8-m}.get(o, m)
            v = pil(v, o, m-1 if o in ('Brightness','Color','Contrast','Sharpness') else their_m)
        want.append(v)
    want = torch.stack(want)
    for dense in (False,True):
        assert torch.equal(policy.apply(x, d, dense=dense), want)
        assert torch.equal(policy.apply(x/255, d, dense=dense), want/255)

def test_images_do_not_depend_on_neighbours(make):
    policy,x = make(fill=0.5),images(64)
    d = drawn(policy, 64)
    y = policy.apply(x, d)
    for part in (slice(0,7), slice(40,64)): assert torch.equal(policy.apply(x[part], type(d)(*[o[part] for o in d])), y[part])

def test_one_channel(make):
    "Color does nothing, the rest does what it does to three equal channels; Sharpness and Contrast of grey too"
    x = images(256, c=1)
    policy = make().bind(Data(1, torch.tensor([0.4])))
    d = drawn(policy, 256)
    y = policy.apply(x, d)
    assert (d.op==OP['Color']).any() and not torch.equal(x, y)
    only = ((d.op==OP['Color']) | (d.op<0)).all(1)
    assert torch.equal(y[only], x[only])
    grey = make(fill=0.4).apply(x.expand(-1,3,-1,-1), d)
    assert torch.equal(grey, y.expand(-1,3,-1,-1))

def test_holes_have_the_mean_of_the_data(make):
    mean = torch.tensor([0.2,0.4,0.6])
    policy = make()
    bound = policy.bind(Data(3, mean))
    assert torch.equal(bound.fill, mean) and policy.fill is None and bound is not policy
    assert make(fill=0.3).bind(Data(3, mean)).fill==torch.tensor(0.3)
    own,d = images(2).float().mean((0,2,3))/255,drawn(policy, 2)
    assert torch.equal(make().bind(Data(3)).apply(images(2), d), make(fill=own).apply(images(2), d))
    away = torch.tensor([[OP['TranslateX']]])
    y = TrivialAugmentWide().bind(Data(3, mean)).apply(images(1), TrivialAugmentWide().at_levels(away, 30, torch.zeros(1,1)))
    assert torch.equal(y, torch.tensor([51,102,153], dtype=torch.uint8).view(1,3,1,1).expand(1,3,*SIZE)) # 32 pixels of 32

def test_targets_that_are_images_are_refused(make):
    with pytest.raises(ValueError, match=r"would shift images against their targets \(TensorImage\): use `PBAPolicy`"):
        make().bind(Data(3, None, 'TensorImage', 'TensorImage'))

# --- in a fit

def learner(**kwargs): return small_learner(dls=digits_dls(200, 100, bs=20, size=12, **kwargs))

@pytest.mark.parametrize('on_bytes', [True,False])
def test_a_fit_with_each(make, on_bytes, monkeypatch):
    "Beside `Normalize`, on bytes in front of the division by 255 or on floats behind it: what comes is what went in, augmented; the Learner is clean after"
    seen,own = [],SearchFree.apply
    def apply(self, x, drawn, *args, **kwargs):
        seen.append((x.clone(), self.fill))
        return own(self, x, drawn, *args, **kwargs)
    monkeypatch.setattr(SearchFree, 'apply', apply)
    monkeypatch.setattr(SearchFree, 'on_bytes', on_bytes)
    learn = learner(batch_tfms=Normalize.from_stats([0.3]*3, [0.37]*3))
    before = [*learn.dls.train.after_batch.fs]
    policy = make()
    learn.fit(1, cbs=PolicyCallback(policy, seed=0))
    assert len(seen)==10 and all((x.dtype==torch.uint8)==on_bytes for x,_ in seen)
    assert all(torch.allclose(fill, torch.full((3,), 0.3)) for _,fill in seen) and policy.fill is None
    assert [*learn.dls.train.after_batch.fs]==before and '_with_events' not in learn.__dict__
    assert not any(isinstance(cb, PolicyCallback) for cb in learn.cbs)

def trained(policy, seed):
    set_seed(0) # the loader takes the seed of its order when it is made
    learn = learner(batch_tfms=Normalize.from_stats([0.3]*3, [0.37]*3))
    learn.fit(1, cbs=PolicyCallback(policy, seed=seed) if policy else None)
    return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

def test_a_fit_is_reproducible(make):
    a,b,c,none = trained(make(), 1),trained(make(), 1),trained(make(), 2),trained(None, 1)
    assert torch.equal(a, b) and not torch.equal(a, c) and not torch.equal(a, none)

def test_a_search_is_refused(make):
    with pytest.raises(ValueError, match=f"^{make().name} has no hyperparameters to search: use it with PolicyCallback$"): HBACallback(policy=make())

def test_beside_a_policy_that_is_searched():
    "An empty space has an empty dose: the sum searches what PBAPolicy has"
    learn,hba = learner(),HBACallback(policy=PBAPolicy()+TrivialAugmentWide(), warmup=0., seed=0)
    learn.fit(1, cbs=hba)
    assert len(hba.start)==54 and not torch.equal(hba.schedule.lam(1.), hba.schedule.lam(0.))

# --- arguments, devices

@pytest.mark.parametrize('n,m', [(0,9),(2,31),(2,-1),(1,4.5)])
def test_rand_refuses(n, m):
    with pytest.raises(ValueError, match=f"RandAugment.{n}, {m}. has {n} operations of magnitude {m}"): RandAugment(n, m)

def test_auto_refuses():
    with pytest.raises(ValueError, match="no policy 'cifar100': use one of .'imagenet', 'cifar10', 'svhn'."): AutoAugment('cifar100')

def test_moves_with_its_tables(make):
    "All that a draw looks into is a buffer, and codes stay whole numbers"
    policy = make().bind(Data(3, torch.full((3,), 0.5))).to('meta')
    assert {b.device.type for b in policy.buffers()}=={'meta'}
    assert all(not b.is_floating_point() for n,b in policy.named_buffers() if n in ('op','choices','level'))
    assert policy.state_dict().keys()=={'fill'}
    assert not any(isinstance(o, torch.Tensor) for o in vars(policy).values())

@pytest.mark.parametrize('n,m', [(2,9.), (2.5,9)])
def test_numbers_that_are_not_whole_are_refused(n, m):
    with pytest.raises(ValueError, match='give at least one operation, and a whole magnitude'): RandAugment(n, m)
