"The 15 operations against Pillow, and their two ways (samples picked out, all computed and chosen) against each other"
import numpy as np, pytest, torch
from PIL import Image,ImageDraw,ImageEnhance,ImageOps
from hba_fastai import ops
from hba_fastai.ops import OPS,OP_NAMES,apply_ops,to_levels
from hba_fastai.pba import PBAPolicy
from hba_fastai.space import ENHANCERS,GEOMETRIC,PBASpace,TABLE7

FILL = (125,122,113)

def pil_affine(im, coef): return im.transform(im.size, Image.AFFINE, coef, Image.NEAREST, fillcolor=FILL)

def pil_cutout(im, m, cx, cy):
    "Pillow's rectangle over the pixels whose centres lie strictly inside the square"
    (w,h),half = im.size,np.float32(m)*min(im.size)/2
    xs,ys = ([i for i in range(n) if abs(np.float32(i+0.5)-np.float32(c)*n)<half] for n,c in ((w,cx),(h,cy)))
    if xs and ys: ImageDraw.Draw(im).rectangle([xs[0],ys[0],xs[-1],ys[-1]], fill=FILL)
    return im

PIL = {'ShearX': lambda im,m: pil_affine(im, (1,m,0,0,1,0)),
       'ShearY': lambda im,m: pil_affine(im, (1,0,0,m,1,0)),
       'TranslateX': lambda im,m: pil_affine(im, (1,0,m*im.size[0],0,1,0)),
       'TranslateY': lambda im,m: pil_affine(im, (1,0,0,0,1,m*im.size[1])),
       'Rotate': lambda im,m: im.rotate(m, Image.NEAREST, fillcolor=FILL),
       'AutoContrast': lambda im,m: ImageOps.autocontrast(im),
       'Invert': lambda im,m: ImageOps.invert(im),
       'Equalize': lambda im,m: ImageOps.equalize(im),
       'Solarize': lambda im,m: ImageOps.solarize(im, 256-m),
       'Posterize': lambda im,m: ImageOps.posterize(im, max(1, 8-round(m))),
       **{o: (lambda o: lambda im,m: getattr(ImageEnhance,o)(im).enhance(m))(o) for o in ENHANCERS}}
EXACT = GEOMETRIC + 'Equalize Invert Solarize Posterize Brightness Cutout'.split()

def images(n, h, w, seed):
    "Half noise, half smooth pictures with few levels, as uint8"
    rng = np.random.default_rng(seed)
    noise = rng.integers(0, 256, (n//2,h,w,3))
    y,x = np.mgrid[:h,:w]
    smooth = [np.stack([a*x/w + b*y/h + c for a,b,c in rng.uniform(0, 85, (3,3))], -1).round() for _ in range(n-n//2)]
    return np.concatenate([noise,smooth]).astype(np.uint8)

def magnitudes(name, n, seed):
    lo,hi = TABLE7[name] or (0,0)
    m = np.random.default_rng(seed).uniform(lo, hi, n).astype(np.float32)
    m[0],m[-1] = lo,hi
    return torch.tensor(m*np.where(np.arange(n)%2, -1, 1) if name in GEOMETRIC else m, dtype=torch.float32)

@pytest.mark.parametrize('size', [(32,32),(61,47)])
@pytest.mark.parametrize('name', OP_NAMES)
def test_equals_pillow(name, size, n=60):
    v,m = images(n, *size, seed=1),magnitudes(name, n, seed=2)
    centre = torch.rand(n, 2, generator=torch.Generator().manual_seed(3))
    x = torch.tensor(v).permute(0,3,1,2)/255
    ours = (OPS[name](x, m, centre=centre, fill=[o/255 for o in FILL])*255).round().permute(0,2,3,1).numpy().astype(int)
    pil = (lambda im,m,c: pil_cutout(im, m, *c)) if name=='Cutout' else (lambda im,m,_: PIL[name](im, m))
    theirs = [np.array(pil(Image.fromarray(v[i]), m[i].item(), centre[i].numpy())) for i in range(n)]
    off = abs(ours-np.stack(theirs).astype(int))
    message = f'{name}: off by {off.max()} levels in {(off>0).mean():.2%} of the values'
    assert off.max() <= (0 if name in EXACT else 1), message
    if TABLE7[name] and name!='Cutout': assert (ours!=v).any()

@pytest.mark.parametrize('name', ['Rotate','ShearX','TranslateY'])
def test_bilinear_equals_pillow_within_a_level(name, n=20):
    v = images(n, 61, 47, seed=1)
    m = magnitudes(name, n, seed=2)
    x = torch.tensor(v).permute(0,3,1,2)/255
    ours = (OPS[name](x, m, fill=[o/255 for o in FILL], bilinear=True)*255).round().permute(0,2,3,1).numpy().astype(int)
    for i in range(n):
        im,k = Image.fromarray(v[i]),m[i].item()
        coef = {'ShearX': (1,k,0,0,1,0), 'TranslateY': (1,0,0,0,1,k*61)}
        if name=='Rotate': pil = im.rotate(k, Image.BILINEAR, fillcolor=FILL)
        else: pil = im.transform(im.size, Image.AFFINE, coef[name], Image.BILINEAR, fillcolor=FILL)
        assert abs(ours[i]-np.array(pil).astype(int)).max()<=1

@pytest.mark.parametrize('c', [1,3,4,7])
def test_dense_equals_picked(c, n=256):
    "What an accelerator computes (everything, then `where`) equals what a CPU computes (only the samples that need it)"
    g = torch.Generator().manual_seed(0)
    x = torch.rand(n, c, 17, 23, generator=g)
    policy = PBAPolicy(fill=0.3, skip=[] if c==3 else ['Color'])
    d = policy.draw_under(torch.randn(n, 54, generator=g)*2, g)
    assert set(d.op.unique().tolist())-{-1} == {i for i,o in enumerate(OP_NAMES) if c==3 or o!='Color'}
    assert torch.equal(policy.apply(x, d, dense=True), policy.apply(x, d, dense=False))

@pytest.mark.parametrize('way', [dict(), dict(dense=True), dict(inplace=True)])
@pytest.mark.parametrize('portion', [2**12, 2**21])
def test_apply_ops_is_per_sample(way, portion, monkeypatch, n=300):
    """Each sample of a mixed batch gets what it would get alone, whatever the way and the size of the portions
    (9 images, all); its first operation may be none"""
    g = torch.Generator().manual_seed(0)
    v,op = to_levels(torch.rand(n, 3, 12, 12, generator=g)),torch.randint(-1, 15, (n,2), generator=g)
    m,centre,fill = torch.rand(n, 2, generator=g)*0.3,torch.rand(n, 2, 2, generator=g),torch.tensor(FILL)/255
    alone = lambda i,k,w: OPS[OP_NAMES[op[i,k]]](w, m[i:i+1,k], centre[i:i+1,k], fill) if op[i,k]>=0 else w
    want = torch.cat([alone(i, 1, alone(i, 0, v[i:i+1]/255)) for i in range(n)])
    monkeypatch.setattr(ops, 'PORTION', portion)
    assert torch.equal(apply_ops(v.clone(), op, m, centre, fill, **way), to_levels(want))

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float64])
@pytest.mark.parametrize('dense', [False, True])
def test_default_dtype_changes_nothing(dtype, dense):
    "Levels up to 255 need more than the 8 bits of bfloat16"
    g = torch.Generator().manual_seed(0)
    v = torch.randint(40, 200, (300,3,9,9), dtype=torch.uint8, generator=g)
    m,centre = torch.rand(300, 1, generator=g)*2,torch.rand(300, 1, 2, generator=g)
    do = lambda: apply_ops(v, torch.arange(300)[:,None]%15, m, centre, torch.tensor(FILL)/255, dense=dense)
    want = do()
    torch.set_default_dtype(dtype)
    try: assert torch.equal(do(), want)
    finally: torch.set_default_dtype(torch.float32)

def test_one_level_images_and_tiny_images():
    for size in ((1,1),(2,2),(2,9),(3,3)):
        for level in (0,7,255):
            x = torch.full((2,3,*size), level/255)
            for name in ('AutoContrast','Equalize'): assert torch.equal(OPS[name](x, torch.zeros(2)), x)
            for name,f in OPS.items(): assert f(x, torch.full((2,), 0.2), centre=torch.rand(2,2)).shape==x.shape

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.rand(8,3,9,9).to(dtype)
    y = PBAPolicy()(x, torch.zeros(8,54))
    assert y.dtype==dtype and y.min()>=0 and y.max()<=1

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_level_that_nothing_changes_is_the_same_again(dtype):
    x = (torch.arange(256).to(dtype)/255).view(1,1,16,16)
    assert torch.equal(OPS['Rotate'](x, torch.zeros(1)), x)

@pytest.mark.parametrize('dense', [False,True])
def test_no_gradient_goes_through_a_table(dense):
    x = torch.rand(1, 3, 4, 4, requires_grad=True)
    y = apply_ops(x, torch.tensor([[OP_NAMES.index('Invert')]]), torch.zeros(1,1), torch.zeros(1,1,2), dense=dense)
    assert not y.requires_grad and x.requires_grad

def test_an_empty_batch_has_no_colour():
    policy = PBAPolicy()
    policy(torch.empty(0, 3, 4, 4), torch.zeros(0, 54))
    assert policy.colour_for(torch.full((2,3,4,4), 0.8)).min()>0.79

@pytest.mark.filterwarnings('ignore:Color needs RGB')
@pytest.mark.parametrize('c', [1,2,3,4])
def test_holes_have_the_colour_of_the_first_batch(c):
    space = PBASpace()
    cut = space.start({f'{o}_{k}.p': float(o=='Cutout') for o in OP_NAMES for k in (0,1)}|{f'Cutout_{k}.m': 0.2 for k in (0,1)}).expand(64,-1)
    policy,g = PBAPolicy(),torch.Generator().manual_seed(0)
    for level in (0.2,0.8): y = policy(torch.full((64,c,8,8), level), cut, g)
    assert {round(v, 2) for v in y.unique().tolist()}=={0.2,0.8}

def test_errors():
    x = torch.rand(2,3,8,8)
    with pytest.raises(TypeError, match='float images'): OPS['Invert']((x*255).byte(), torch.zeros(2))
    with pytest.raises(ValueError, match='2 images and 3 magnitudes'): OPS['Rotate'](x, torch.zeros(3))
    with pytest.raises(ValueError, match='Color needs RGB'): OPS['Color'](x[:,:1], torch.zeros(2))
    with pytest.raises(ValueError, match='Cutout needs `centre`'): OPS['Cutout'](x, torch.zeros(2))

def test_one_image_that_is_a_part_of_others():
    "A dimension of size 1 may have any stride"
    clip = torch.randint(0, 256, (1,16,3,30,30), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    op,m,centre = torch.tensor([[OP_NAMES.index('Invert')]]),torch.zeros(1,1),torch.zeros(1,1,2)
    assert torch.equal(apply_ops(clip[:,0], op, m, centre), 255-clip[:,0])
