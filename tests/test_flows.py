"""Every way that fastai users train, for the search and for the replay. The table in the documentation is made from this file:
`tests/flows.json` must be what is run here
(`HBA_WRITE_FLOWS=1 pytest tests/test_flows.py` writes it)"""
import json,os
from functools import partial
from pathlib import Path
import numpy as np, pytest, torch
import torch.nn.functional as F
from fastai.callback.all import (ActivationStats,BnFreeze,ChannelsLast,CSVLogger,CutMix,EarlyStoppingCallback,
                                 FetchPredsCallback,GradientAccumulation,GradientClip,MixedPrecision,MixUp,
                                 ProgressCallback,ReduceLROnPlateau,SaveModelCallback,TerminateOnNaNCallback)
from fastai.data.all import DataBlock,MultiCategoryBlock,RandomSplitter,RegressionBlock,get_image_files
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat,LabelSmoothingCrossEntropy,MSELossFlat
from fastai.metrics import accuracy
from fastai.optimizer import Adam,Lamb,OptimWrapper,RMSProp,SGD,ranger
from fastai.torch_core import set_seed
from fastai.vision.all import (BBoxBlock,BBoxLblBlock,ImageBlock,ImageDataLoaders,MaskBlock,PointBlock,Resize,aug_transforms,models,
                               unet_learner,vision_learner,xresnet18)
from PIL import Image
from torch import nn
from conftest import quiet,small_learner,small_net
from hba_fastai.replay import ScheduleCallback
from hba_fastai.search import HBACallback
from hba_fastai.transform import PolicyTransform
from hba_fastai.data import array_dls,digits
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace

pytestmark = pytest.mark.filterwarnings('ignore') # fastai, timm and loggers warn at will; our own warnings are tested where they belong
FLOWS = {} # (group, name) -> (what the search does, function of the callback)

def flow(group, name, search='works'):
    def deco(f): FLOWS[group,name] = search,f; return f
    return deco

@pytest.fixture(scope='session')
def pngs(tmp_path_factory):
    d = tmp_path_factory.mktemp('digits')
    x,y = digits(24)
    for i in range(60):
        f = d/f'{y[i]%3}'/f'{i}.png'; f.parent.mkdir(exist_ok=True)
        Image.fromarray(x[i].permute(1,2,0).numpy()).save(f)
    Flow.path = d
    return d

class Flow: path = None

def folder(size=32, bs=8, **kw):
    set_seed(0)
    return ImageDataLoaders.from_folder(Flow.path, valid_pct=0.4, seed=1, bs=bs, num_workers=0, item_tfms=Resize(size), **kw)

def hush(learn):
    learn.logger = quiet
    return learn.remove_cb(ProgressCallback)

def vision(arch=models.resnet18, size=32, dls=None, **kw):
    set_seed(0)
    return hush(vision_learner(dls or folder(size), arch, pretrained=False, metrics=accuracy, **kw))

# --- fits
@flow('fits', 'fit')
def _(cb): l = small_learner(); l.fit(2, cbs=cb); return l
@flow('fits', 'fit_one_cycle')
def _(cb): l = small_learner(); l.fit_one_cycle(2, cbs=cb); return l
@flow('fits', 'fit_flat_cos')
def _(cb): l = small_learner(); l.fit_flat_cos(2, cbs=cb); return l
@flow('fits', 'fit_sgdr')
def _(cb): l = small_learner(); l.fit_sgdr(2, 1, cbs=cb); return l
@flow('fits', 'fine_tune')
def _(cb):
    l = vision()
    l.fine_tune(2, cbs=cb)
    if isinstance(cb, HBACallback): assert cb.schedule.progress.tolist()==pytest.approx([0,0.3,1/3,2/3,1]) # progress over both fits
    return l
@flow('fits', 'fine_tune with frozen batch norm (`train_bn=False`)')
def _(cb): l = vision(train_bn=False); l.fine_tune(2, cbs=cb); return l
@flow('fits', 'k folds with one callback', search='works, each model a search of its own')
def _(cb):
    for i in range(2): l = small_learner(seed=i); l.fit(2, cbs=cb)
    if isinstance(cb, HBACallback): assert cb.schedule.progress.tolist()==[0,0.3,0.5,1]
    return l
@flow('fits', 'stopped by Ctrl-C, then fitted again')
def _(cb):
    from fastai.callback.core import Callback
    class Stop(Callback):
        def after_step(self):
            if self.train_iter==5: raise KeyboardInterrupt
    l = small_learner()
    with pytest.raises(KeyboardInterrupt): l.fit(2, cbs=[cb,Stop()])
    l.fit(2, cbs=cb)
    return l
@flow('fits', 'frozen body')
def _(cb): l = vision(); l.freeze(); l.fit(2, cbs=cb); return l
@flow('fits', 'discriminative learning rates')
def _(cb): l = vision(); l.unfreeze(); l.fit_one_cycle(2, slice(1e-4,1e-2), cbs=cb); return l
@flow('fits', 'start_epoch (SkipToEpoch)')
def _(cb): l = small_learner(); l.fit(4, cbs=cb, start_epoch=2); return l
@flow('fits', 'reset_opt')
def _(cb): l = small_learner(); l.fit(1); l.fit(2, cbs=cb, reset_opt=True); return l

# --- the callback given to the Learner: everything but a fit runs as if it were not there
def twin(cb, f, **kw):
    plain,ours = (vision(cbs=c, **kw) for c in ([],[cb]))
    ours.model.load_state_dict(plain.model.state_dict())
    a,b = f(plain),f(ours)
    many = lambda o: isinstance(o, (list,tuple)) or hasattr(o, 'items') and not isinstance(o, dict)
    flat = lambda o: [t for v in o for t in (flat(v) if many(v) else [v])] if many(o) else [o]
    for u,v in zip(flat(a), flat(b), strict=True): assert torch.equal(u,v) if isinstance(u, torch.Tensor) else u==v
    ours.fit(2)
    return ours
def seeded(f): set_seed(3); return f()
@flow('Learner(cbs=...)', 'fit')
def _(cb): l = small_learner(cbs=cb); l.fit(2); return l
@flow('Learner(cbs=...)', 'fine_tune')
def _(cb): l = vision(cbs=cb); l.fine_tune(2); return l
@flow('Learner(cbs=...)', 'stopped by Ctrl-C, then fitted again')
def _(cb):
    from fastai.callback.core import Callback
    class Stop(Callback):
        def after_step(self):
            if self.train_iter==5: raise KeyboardInterrupt
    l = small_learner(cbs=cb)
    with pytest.raises(KeyboardInterrupt): l.fit(2, cbs=Stop())
    l.fit(2)
    return l
@flow('Learner(cbs=...)', 'lr_find')
def _(cb): return twin(cb, lambda l: [float(seeded(lambda: l.lr_find(num_it=12, end_lr=1, show_plot=False)).valley)])
@flow('Learner(cbs=...)', 'validate')
def _(cb): return twin(cb, lambda l: list(l.validate()))
@flow('Learner(cbs=...)', 'get_preds')
def _(cb): return twin(cb, lambda l: list(l.get_preds()))
@flow('Learner(cbs=...)', 'get_preds on the training set')
def _(cb): return twin(cb, lambda l: list(seeded(lambda: l.get_preds(ds_idx=0))))
@flow('Learner(cbs=...)', 'predict')
def _(cb): return twin(cb, lambda l: [l.predict(get_image_files(Flow.path)[0])[2]])
@flow('Learner(cbs=...)', 'tta')
def _(cb): return twin(cb, lambda l: list(seeded(lambda: l.tta(n=2))))
@flow('Learner(cbs=...)', 'summary')
def _(cb): return twin(cb, lambda l: [str(l.summary()).replace('HBACallback','').replace('ScheduleCallback','').split('Callbacks')[0]])
@flow('Learner(cbs=...)', 'show_results')
def _(cb):
    import matplotlib; matplotlib.use('Agg')
    return twin(cb, lambda l: [l.show_results(max_n=2)])
@flow('Learner(cbs=...)', 'export after the fit, load_learner')
def _(cb):
    l = vision(cbs=cb); l.fit(2)
    l.logger = print # a function of this module could not be loaded elsewhere
    l.export(Flow.path/'e.pkl')
    from fastai.learner import load_learner
    assert len(load_learner(Flow.path/'e.pkl').predict(get_image_files(Flow.path)[0])[2])==3
    return l

# --- optimizers
for name,f in dict(Adam=Adam, SGD=partial(SGD, mom=0.9), RMSProp=RMSProp, Lamb=Lamb, ranger=ranger).items():
    @flow('optimizers', name)
    def _(cb, f=f): l = small_learner(opt_func=f); l.fit(2, cbs=cb); l.fit(1); return l
for name,f in dict(SGD=partial(torch.optim.SGD, momentum=0.9), AdamW=torch.optim.AdamW).items():
    @flow('optimizers', f'OptimWrapper(torch.optim.{name})')
    def _(cb, f=f): l = small_learner(opt_func=partial(OptimWrapper, opt=f)); l.fit_one_cycle(2, cbs=cb); l.fit(1); return l

# --- companions
def with_cbs(*cbs, **kw): return lambda cb: (l:=small_learner(**kw), l.fit(2, cbs=[cb, *[c() for c in cbs]]))[0]
flow('companions', 'to_fp16 (on this machine without a GPU: fastai falls back to fp32)')(lambda cb: (l:=small_learner().to_fp16(), l.fit(2, cbs=cb))[0])
flow('companions', 'to_bf16 (likewise)')(lambda cb: (l:=small_learner().to_bf16(), l.fit(2, cbs=cb))[0])
class CPUAMP(MixedPrecision):
    "Mixed precision with the real autocast and GradScaler, on the CPU"
    name = 'mixed_precision'
    def before_fit(self):
        half = self.amp_mode.value=='fp16'
        self.autocast,self.learn.scaler,self.scales = torch.amp.autocast('cpu',
            dtype=torch.float16 if half else torch.bfloat16),torch.amp.GradScaler('cpu', enabled=half, init_scale=2.**10),[]
flow('companions', 'float16 autocast with a gradient scaler (CPU)')(with_cbs(lambda: CPUAMP('fp16')))
flow('companions', 'bfloat16 autocast (CPU)')(with_cbs(lambda: CPUAMP('bf16')))
flow('companions', 'GradientAccumulation')(with_cbs(lambda: GradientAccumulation(40)))
flow('companions', 'GradientClip')(with_cbs(lambda: GradientClip(0.1)))
flow('companions', 'ChannelsLast')(with_cbs(ChannelsLast))
flow('companions', 'EarlyStopping')(with_cbs(lambda: EarlyStoppingCallback(patience=5)))
flow('companions', 'ReduceLROnPlateau')(with_cbs(lambda: ReduceLROnPlateau(patience=1)))
flow('companions', 'TerminateOnNaN')(with_cbs(TerminateOnNaNCallback))
flow('companions', 'ActivationStats')(with_cbs(lambda: ActivationStats(modules=None)))
flow('companions', 'FetchPreds')(with_cbs(FetchPredsCallback))
flow('companions', 'BnFreeze')(with_cbs(BnFreeze))
flow('companions', 'label smoothing')(with_cbs(loss_func=LabelSmoothingCrossEntropy()))
flow('companions', 'weighted loss')(with_cbs(loss_func=CrossEntropyLossFlat(weight=torch.linspace(0.5,2,10))))
@flow('companions', 'monitoring the hyper-validation loss (EarlyStopping on `hyper_loss`)')
def _(cb):
    l = small_learner()
    l.fit(2, cbs=[cb, EarlyStoppingCallback(monitor='hyper_loss' if isinstance(cb, HBACallback) else 'valid_loss', patience=3)])
    return l
@flow('companions', 'SaveModel: best, restored at the end, loads into a plain model')
def _(cb):
    l = small_learner(path=Flow.path)
    l.fit(2, cbs=[cb, SaveModelCallback(fname='best', with_opt=True)])
    p = small_learner(path=Flow.path); p.load('best', with_opt=True)
    assert all(torch.equal(u, v) for u,v in zip(p.model.state_dict().values(), l.model.state_dict().values()))
    p.fit(1)
    return l
@flow('companions', 'SaveModel: every epoch')
def _(cb):
    l = small_learner(path=Flow.path)
    l.fit(2, cbs=[cb, SaveModelCallback(fname='each', every_epoch=True, with_opt=True)])
    small_learner(path=Flow.path).load('each_0', with_opt=True)
    return l
@flow('companions', 'CSVLogger')
def _(cb):
    l = small_learner(path=Flow.path); l.create_mbar = False
    l.add_cb(ProgressCallback())
    with l.no_mbar(): l.fit(2, cbs=[cb, CSVLogger(fname='h.csv')])
    rows = [r.split(',') for r in (Flow.path/'h.csv').read_text().strip().split('\n')]
    assert len(rows)==3 and len({len(r) for r in rows})==1 and ('mean_p' in rows[0])==isinstance(cb, HBACallback)
    return l
@flow('companions', 'TensorBoard')
def _(cb):
    from fastai.callback.tensorboard import TensorBoardCallback
    l = small_learner(); l.fit(2, cbs=[cb, TensorBoardCallback(Flow.path/'tb', trace_model=False, log_preds=False)])
    assert list((Flow.path/'tb').rglob('events*'))
    return l
@flow('companions', 'Weights & Biases (offline)')
def _(cb):
    import wandb
    import fastai.callback.wandb as fw
    from fastai.callback.wandb import WandbCallback
    init_args = fw.init_args # fastai 2.8.12 with fastcore 2.2.39 fails here by itself, with any list of text in a setting of the Learner
    fw.init_args = lambda o: init_args(o) if hasattr(o, '__dict__') else {}
    with wandb.init(mode='offline', dir=str(Flow.path), settings=wandb.Settings(silent=True)) as run:
        l = vision(); l.fit(2, cbs=[cb, WandbCallback(log_preds=False, log_model=False)])
        assert ('mean_p' in run.summary.keys())==isinstance(cb, HBACallback)
    return l
for mix in (MixUp,CutMix):
    flow('companions', mix.__name__, search=f'refused: {mix.__name__} mixes images whose hyperparameters differ')(with_cbs(mix))
@flow('companions', 'torch.compile', search='refused: The model is compiled')
def _(cb): l = small_learner(model=torch.compile(small_net(), backend='eager')); l.fit(2, cbs=cb); return l
@flow('companions', 'nn.DataParallel', search='refused: nn.DataParallel splits')
def _(cb): l = small_learner(model=nn.DataParallel(small_net())); l.fit(2, cbs=cb); return l

# --- models: the default finds the layer that responds
def family(name, arch, layer, **kw):
    @flow('models', name)
    def _(cb):
        l = vision(arch, dls=folder(bs=3), **kw); l.fit(3, 1e-3, cbs=cb)
        if isinstance(cb, HBACallback): assert cb.schedule.provenance['layers']==[layer]
        return l
family('torchvision resnet', models.resnet18, '0.1')
family('torchvision mobilenet', models.mobilenet_v3_small, '0.0.0.1')
family('torchvision efficientnet', models.efficientnet_b0, '0.0.0.1')
family('torchvision convnext', models.convnext_tiny, '0.0.0.1')
family('xresnet', xresnet18, '0.0.1')
family('timm resnet', 'resnet10t', '0.model.conv1.1')
family('timm mobilenet', 'mobilenetv3_small_050', '0.model.bn1')
family('timm efficientnet', 'efficientnet_b0', '0.model.bn1')
family('timm convnext', 'convnext_atto', '0.model.stem.1')
family('timm vit', 'vit_tiny_patch16_224', '0.model.blocks.0.norm1', img_size=32)
@flow('models', 'timm with gradient checkpointing')
def _(cb):
    l = vision('resnet10t', dls=folder(bs=3))
    l.model[0].model.set_grad_checkpointing()
    l.fit(3, 1e-3, cbs=cb)
    return l
@flow('models', 'unet_learner')
def _(cb): l = hush(unet_learner(masks(), models.resnet18, pretrained=False, n_out=2)); l.fit(2, cbs=cb); return l
@flow('models', 'nn.Sequential')
def _(cb): l = small_learner(); l.fit(2, cbs=cb); return l
@flow('models', 'nn.Sequential without normalisation')
def _(cb):
    l = small_learner(model=nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Conv2d(8,8,3,2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10)))
    l.fit(2, cbs=cb)
    return l
class Patches(nn.Module):
    "Makes four images of each"
    def forward(self, x): return x.unfold(2, 6, 6).unfold(3, 6, 6).permute(0,2,3,1,4,5).reshape(-1, 3, 6, 6)
class Join(nn.Module):
    def forward(self, x): return x.view(-1, 4, 10).mean(1)
@flow('models', 'batch dimension that changes before the layer', search='refused: The layer')
def _(cb): l = small_learner(model=nn.Sequential(Patches(), small_net(), Join())); l.fit(2, cbs=cb); return l

# --- targets: what is a place in the image moves with it; what cannot is never shifted
def masks():
    set_seed(0)
    y = lambda f: Image.fromarray((np.array(Image.open(f).convert('L'))>100).astype(np.uint8))
    return DataBlock((ImageBlock,MaskBlock(['back','ink'])), get_items=get_image_files, get_y=lambda f: np.array(y(f)),
                     splitter=RandomSplitter(0.4, seed=1)).dataloaders(Flow.path, bs=8, num_workers=0)
def block(*blocks, get_y, loss, n, net=None, **kw):
    set_seed(0)
    dls = DataBlock((ImageBlock,*blocks), get_items=get_image_files, get_y=get_y, splitter=RandomSplitter(0.4, seed=1),
                    **kw).dataloaders(Flow.path, bs=8, num_workers=0)
    return small_learner(dls=dls, model=net or small_net(n=n), loss_func=loss)
@flow('targets', 'single label')
def _(cb): l = vision(); l.fit(2, cbs=cb); return l
@flow('targets', 'several labels')
def _(cb): l = block(MultiCategoryBlock, get_y=lambda f: [f.parent.name,'any'], loss=None, n=4); l.metrics = []; l.fit(2, cbs=cb); return l
@flow('targets', 'regression')
def _(cb): l = block(RegressionBlock(1), get_y=lambda f: float(f.parent.name), loss=MSELossFlat(), n=1); l.metrics = []; l.fit(2, cbs=cb); return l
def moves(cb): assert not {'Rotate','ShearX','Cutout'} & set((cb.bound if isinstance(cb, HBACallback) else cb.last).skip)
@flow('targets', 'segmentation masks', search='works, masks move with their images')
def _(cb):
    l = hush(Learner(masks(), per_pixel(2), loss_func=CrossEntropyLossFlat(axis=1)))
    l.fit(2, cbs=cb)
    moves(cb)
    return l
@flow('targets', 'points', search='works, points move with their images')
def _(cb): l = block(PointBlock, get_y=lambda f: torch.tensor([[8.,9.]]), loss=MSELossFlat(), n=2); l.metrics = []; l.fit(2, cbs=cb); moves(cb); return l
@flow('targets', 'boxes', search='works, boxes move with their images')
def _(cb):
    l = block(BBoxBlock, BBoxLblBlock, get_y=[lambda f: [[2,3,9,9]], lambda f: ['it']], loss=lambda p,b,c: F.mse_loss(p, b.view(len(b),-1)), n=4, n_inp=1)
    l.metrics = []; l.fit(2, cbs=cb); moves(cb); return l
def still(cb): assert {'Rotate','ShearX','Cutout'} <= set((cb.bound if isinstance(cb, HBACallback) else cb.last).skip)
def per_pixel(n): return nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8,n,1))
def restored():
    l = block(ImageBlock, get_y=lambda f: f, loss=MSELossFlat(), n=3, net=per_pixel(3))
    l.metrics = []
    return l
@flow('targets', 'images', search='works, without the geometric operations and Cutout')
def _(cb): l = restored(); l.fit(2, cbs=cb); still(cb); return l

# --- images
def shaped(c=3, h=12, w=12, n=100, bs=20, **kw):
    set_seed(0)
    x,y = torch.randint(0, 256, (n,c,h,w), dtype=torch.uint8),torch.randint(0, 10, (n,))
    return small_learner(dls=array_dls((x,y), (x[:40],y[:40]), vocab=range(10), bs=bs), model=small_net(c), **kw)
for c in (1,3,4,9):
    @flow('images', f'{c} channel'+'s'*(c>1), search='works' if c==3 else 'works, without Color')
    def _(cb, c=c): l = shaped(c); l.fit(2, cbs=cb); return l
for h,w in ((8,8),(12,31),(64,9),(224,224),(512,512)):
    @flow('images', f'{h}x{w} pixels')
    def _(cb, h=h, w=w): l = shaped(h=h, w=w, n=100 if h<200 else 8, bs=20 if h<200 else 2); l.fit(2, cbs=cb); return l
@flow('images', 'batches of one')
def _(cb): l = shaped(n=12, bs=1); l.fit(2, cbs=cb); return l
@flow('images', 'uneven last batch')
def _(cb): l = shaped(n=95); l.dls.train.drop_last = False; l.fit(2, cbs=cb); return l
@flow('images', 'channels_last memory')
def _(cb):
    from fastai.callback.core import Callback
    class CL(Callback):
        order = -50
        def before_batch(self): self.learn.xb = tuple(x.contiguous(memory_format=torch.channels_last) for x in self.xb)
    l = shaped(); l.dls.train.dataset.x = l.dls.train.dataset.x.contiguous(memory_format=torch.channels_last); l.fit(2, cbs=[cb, CL()]); return l
@flow('images', 'from files, with aug_transforms and Normalize')
def _(cb): l = vision(dls=folder(batch_tfms=aug_transforms(size=24))); l.fit(2, cbs=cb); return l

# --- where the hyper-steps' data come from
flow('hold-out', '`dls.valid`')(lambda cb: (l:=small_learner(), l.fit(2, cbs=cb))[0])
@flow('hold-out', 'a share of the training set')
def _(cb): l = vision(); setattr(cb, 'valid', 0.25) if isinstance(cb, HBACallback) else None; l.fit(2, cbs=cb); return l
@flow('hold-out', 'a DataLoader')
def _(cb):
    l = vision()
    setattr(cb, 'valid', l.dls.test_dl(get_image_files(Flow.path)[:20], with_labels=True)) if isinstance(cb, HBACallback) else None
    l.fit(2, cbs=cb)
    return l

def held_out(name, valid):
    "A search whose target is `valid(learn)`"
    @flow('hold-out', name)
    def _(cb):
        l = vision()
        if isinstance(cb, HBACallback): cb.valid = valid(l)
        l.fit(2, cbs=cb)
        return l
held_out('a number of training items', lambda l: 12)
held_out('a folder', lambda l: Flow.path)
held_out('a list of files', lambda l: get_image_files(Flow.path)[:20])
held_out('`DataLoaders` (their training items)', lambda l: folder())

# --- what users forbid
@flow('operations', '`skip` and `limits`')
def _(cb):
    l = small_learner()
    if isinstance(cb, HBACallback): cb.__init__(skip=['Invert'], limits={'Rotate': (0,10)}, seed=0)
    l.fit(2, cbs=cb)
    return l

@pytest.fixture
def applied(monkeypatch):
    "Counts the batches that the policy augmented, and keeps its policy"
    n,inner = [],PolicyTransform.encodes
    old = PolicyTransform.before_call
    def spy(self, b, split_idx): n.append(self.policy); return old(self, b, split_idx)
    monkeypatch.setattr(PolicyTransform, 'before_call', spy)
    return n

def make(kind, applied):
    if kind=='search': return HBACallback(seed=0)
    cb = ScheduleCallback(Schedule([0,1], PBASpace().values(torch.stack([PBASpace().start(0.05)]*2))), seed=0)
    type(cb).last = property(lambda self: applied[-1])
    return cb

LARGE = ['timm convnext','timm efficientnet','timm mobilenet','timm vit','timm with gradient checkpointing',
         'torchvision convnext','torchvision efficientnet','xresnet']
def is_slow(name, kind): return name[1] in LARGE or name[0]=='models' and kind=='replay'
CASES = [pytest.param(name, kind, id=' - '.join([*name,kind]), marks=[pytest.mark.slow]*is_slow(name, kind)) for name in FLOWS for kind in ('search','replay')]

@pytest.mark.parametrize('name,kind', CASES)
def test_flow(name, kind, pngs, applied, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    search,f = FLOWS[name]
    cb = make(kind, applied)
    if kind=='search' and search.startswith('refused'):
        with pytest.raises(ValueError, match=search.removeprefix('refused: ')): f(cb)
        return
    learn = f(cb)
    assert applied, 'the policy never acted'
    for dl in learn.dls.loaders: assert not any(isinstance(t, PolicyTransform) for t in dl.after_batch.fs)
    if kind=='replay': return
    assert not torch.equal(cb.schedule.table[0], cb.schedule.table[-1]) and cb.schedule.table.isfinite().all()
    assert all('forward' not in vars(m) for m in learn.model.modules())
    if learn.opt: assert sum(len(g) for g in learn.opt.param_lists)==len([p for p in learn.model.parameters()])

def test_targets_that_are_images_are_never_shifted_silently(pngs):
    "The warning says what is left out, and the images that are targets reach the model as they are in the files"
    learn,seen = restored(),[]
    from fastai.callback.core import Callback
    class See(Callback):
        order = 60
        def before_batch(self):
            if self.training: seen.extend((self.yb[0]*255).round().long().sum((1,2,3)).tolist())
    with pytest.warns(UserWarning, match='geometric operations would shift images against their targets .TensorImage.: they are left out'):
        learn.fit(2, cbs=[HBACallback(start=0.5), See()])
    assert set(seen) <= {int(np.array(Image.open(f).convert('RGB')).sum()) for f in learn.dls.train.items}

def test_table_is_what_is_tested():
    "The documentation's table lists these flows and results, no more and no less"
    rows = [dict(group=g, flow=n, search=s, replay='works') for (g,n),(s,_) in FLOWS.items()]
    rows += [dict(group='several GPUs', flow='`with learn.distrib_ctx():`, two processes (gloo, CPU)', search='works',
                  replay='works')] # tests/test_distributed.py
    f = Path(__file__).with_name('flows.json')
    if os.environ.get('HBA_WRITE_FLOWS'): f.write_text(json.dumps(rows, indent=1, ensure_ascii=False)+'\n')
    assert json.loads(f.read_text())==rows
