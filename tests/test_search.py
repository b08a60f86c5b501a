"The search within a fit: order of the algorithm, what a hyper-step may touch, determinism, undo, and refusals"
import subprocess,sys
import pytest, torch
from fastai.callback.core import Callback,CancelFitException
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.losses import CrossEntropyLossFlat
from fastai.optimizer import OptimWrapper,SGD
from fastai.torch_core import TensorCategory,TensorImage
from fastai.vision.augment import Normalize,aug_transforms
from torch import nn
from conftest import small_learner,small_net
from hba_fastai.policy import Policy
from hba_fastai.replay import PolicyCallback,ScheduleCallback
from hba_fastai.search import HBACallback
from hba_fastai.data import array_dls,digits,digits_dls
from hba_fastai.pba import PBAPolicy
from hba_fastai.schedule import Schedule
from hba_fastai.space import PBASpace,Space

class Log(HBACallback):
    "Notes weight steps (w) and hyper-steps (h)"
    name = 'hba'
    def __init__(self, *a, **k): super().__init__(*a, **k); self.log = ''
    def after_step(self): super().after_step(); self.log += 'w'
    def hyper_step(self): self.log += 'h'; super().hyper_step()

@pytest.mark.parametrize('t,v', [(2,1),(3,2),(1,1),(4,3)])
def test_order_is_algorithm_1(t, v):
    learn,hba = small_learner(n_train=240),Log(T_train=t, T_val=v, warmup=0)
    learn.fit(2, cbs=hba)
    steps = ['w'+('h'*v if (i+1)%t==0 else '') for i in range(24)]
    assert hba.log==''.join(steps)

class Sizes(HBACallback):
    "Notes the numbers of images that hyper-steps take"
    name,sizes = 'hba',()
    def hyper_step(self):
        self.sizes = {*self.sizes, len(self.stream.peek()[0])}
        super().hyper_step()

@pytest.mark.parametrize('share,size', [(1.,20),(0.25,5),(0.01,1)])
def test_a_hyper_step_takes_a_share_of_a_training_batch(share, size):
    learn,hba = small_learner(n_train=240),Sizes(share=share, warmup=0)
    learn.fit(2, cbs=hba)
    assert hba.sizes=={size}
    own = Sizes(share=share, warmup=0, valid=small_learner().dls.valid.new(bs=16))
    small_learner(n_train=240).fit(2, cbs=own)
    assert own.sizes<={16,100%16} # a loader has its own

def test_the_rate_counts_each_step_of_lambda():
    def rate(**kw):
        learn,hba = small_learner(n_train=400),HBACallback(warmup=0., **kw) # 20 steps an epoch
        learn.fit(60, 0., cbs=[hba,Stop()])
        return hba.rate
    assert rate(T_train=1, moves=1)==rate(T_train=2, moves=2)==90/1200<rate(T_train=2, moves=1)==0.1

class Stop(Callback):
    order = 100
    def after_batch(self): raise CancelFitException

def test_moves_of_one_batch_are_one_gradient_in_the_evidence():
    learn,hba = small_learner(),HBACallback(T_train=5, moves=3, warmup=0.)
    learn.fit(1, 1e-2, cbs=hba)
    assert len(hba.lam.series)==len(hba.hyper_steps)==2 and hba.lam.adam[2]==6

class Watch(HBACallback):
    "Compares everything before and after each hyper-step"
    name = 'hba'
    def state(self):
        l,m = self.learn,self.learn.model
        s = {f'model.{k}':v for k,v in m.state_dict().items()}
        s |= {f'grad.{i}':p.grad for i,p in enumerate(m.parameters())} | {f'phi.{i}':p for i,(p,_) in enumerate(self.net.params)}
        s |= {f'phigrad.{i}':p.grad for i,(p,_) in enumerate(self.net.params)}
        s |= {f'opt.{i}.{k}':v for i,(_,_,st,_) in enumerate(l.opt.all_params()) for k,v in st.items()}
        s |= {k:v for k,v in vars(l).items() if k not in ('hba','model','opt','dls')} | {'training': [o.training for o in m.modules()]}
        return {k: v.detach().clone() if isinstance(v, torch.Tensor) else v for k,v in s.items()}
    def hyper_step(self):
        a,lam,ref = self.state(),self.lam.value.clone(),self.net.ref.clone()
        super().hyper_step()
        now = self.net.ref
        if self.centred: self.net.move_to(ref) # take the fold back
        b = self.state()
        self.net.move_to(now)
        own = {f'model.{n}.{k}' for n,k in (('1','weight'),('1','bias'))} if self.centred else set()
        for k in a:
            same = torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] is b[k] or a[k]==b[k]
            assert same or k in own and torch.allclose(a[k], b[k], atol=1e-6), f'a hyper-step changed {k}'
        assert a.keys()==b.keys() and not torch.equal(lam, self.lam.value)
        self.seen = True

@pytest.mark.parametrize('kw', [dict(), dict(condition='lambda'), dict(condition='lambda', centred=False)])
def test_a_hyper_step_changes_lambda_alone(kw):
    learn,hba = small_learner(),Watch(**kw)
    learn.fit(2, cbs=hba)
    assert hba.seen

def lam_of(seed, **kw):
    learn,hba = small_learner(),HBACallback(seed=seed, **kw)
    learn.fit_one_cycle(2, 1e-2, cbs=hba)
    return hba.schedule.table,learn.model.state_dict()

@pytest.mark.parametrize('kw', [dict(), dict(condition='lambda')])
def test_same_seed_same_schedule(kw):
    (a,ma),(b,mb),(c,_) = lam_of(1,**kw),lam_of(1,**kw),lam_of(2,**kw)
    assert torch.equal(a,b) and all(torch.equal(ma[k],mb[k]) for k in ma) and not torch.equal(a,c)
    assert (a[0]-PBASpace().values(PBASpace().start().double())).abs().max()<1e-5 and not torch.equal(a[0],a[-1])

def plain(learn):
    "What must be as it was"
    return dict(keys=list(learn.model.state_dict()), types=[type(m) for m in learn.model.modules()], vars=[sorted(vars(m)) for m in learn.model.modules()],
                groups=[len(g) for g in learn.opt.param_lists] if learn.opt else None,
                metrics=list(learn.metrics), cbs=list(learn.cbs), attrs=sorted(vars(learn)),
                tfms=[list(dl.after_batch.fs) for dl in learn.dls.loaders], ids=[id(p) for g in learn.opt.param_lists for p in g] if learn.opt else None,
                state=len(learn.opt.state) if learn.opt else None, opt=sorted(vars(learn.opt)) if learn.opt else None)

class Boom(Callback):
    order = 40
    def __init__(self, event, what): self.event,self.what = event,what
    def __call__(self, event):
        if event==self.event and self.learn.train_iter>=13: raise self.what

@pytest.mark.parametrize('end', [None,KeyboardInterrupt(),RuntimeError('foreign'),CancelFitException()])
@pytest.mark.parametrize('event', ['after_pred','after_step','before_validate','after_batch'])
@pytest.mark.parametrize('cb', [HBACallback, lambda: HBACallback(centred=False, strategy='conv+bn'),
                                lambda: ScheduleCallback(Schedule([0.], PBASpace().values(PBASpace().start(0.05))[None]))])
def test_the_learner_is_left_plain(cb, event, end):
    if end is None and event!='after_pred': return
    learn = small_learner()
    learn.fit(1)
    before,cb = plain(learn),cb()
    x = torch.rand(4,3,12,12)
    try: learn.fit(3, cbs=[cb, *([Boom(event, end)] if end else [])])
    except (KeyboardInterrupt,RuntimeError) as e: assert end is not None
    after = plain(learn)
    assert before=={**after, 'attrs': before['attrs']} and set(after['attrs'])-set(before['attrs'])<={'smooth_loss','final_record','loss_grad'}
    if isinstance(cb, HBACallback):
        assert cb.schedule is learn.hba_schedule and len(cb.schedule) >= (4 if end is None else 2)
        twin = small_net(); twin.load_state_dict(learn.model.state_dict())
        assert torch.equal(twin.eval()(x), learn.model.eval()(x))
    learn.fit(1)
    learn.validate()

def test_uncentred_layers_hold_the_plain_network_after_training():
    "Between training phases the literal form is folded: validation and files see θ̂(λ)"
    seen = {}
    class See(Callback):
        order = 30
        def before_validate(self):
            hba,l = self.learn.hba,self.learn.hba.net.layers[0]
            if 'w' not in seen: seen['w'],seen['resp'] = l.layer.weight.detach().clone(),(l.V['weight']@hba.net.ref*l.U['weight']).detach().clone()
        def before_batch(self):
            if self.training and 'w' in seen and 'phi0' not in seen: seen['phi0'] = self.learn.hba.net.layers[0].layer.weight.detach().clone()
    small_learner().fit(2, cbs=[HBACallback(centred=False), See()])
    assert torch.allclose(seen['phi0'], seen['w']-seen['resp'], atol=1e-6) and seen['resp'].abs().max()>1e-4

@pytest.mark.parametrize('opt_func', [SGD, lambda p,lr: OptimWrapper(p, torch.optim.SGD, lr=lr)])
def test_optimizer_groups_and_saved_state(opt_func, tmp_path):
    "φ learn at the rate of the fastest group; files written in mid-search are those of the plain Learner"
    split = lambda m: [list(m[:4].parameters()),list(m[4:].parameters())]
    learn = small_learner(opt_func=opt_func, splitter=split)
    class Mid(Callback):
        def after_batch(self):
            if self.training and self.learn.train_iter==9:
                hba,opt = self.learn.hba,self.learn.opt
                assert [len(g) for g in opt.param_lists]==[6,4+4]
                assert all(any(p is q for q in opt.param_lists[1]) for p,_ in hba.net.params)
                assert all(v.abs().max()>0 for k,v in hba.net.layers[0].V.items())
                self.learn.save(f'{tmp_path}/mid', with_opt=True)
                assert [len(g) for g in opt.param_lists]==[6,8]
    learn.fit(1, lr=slice(1e-3,1e-2), cbs=[HBACallback(), Mid()])
    fresh = small_learner(opt_func=opt_func, splitter=split)
    fresh.load(f'{tmp_path}/mid', with_opt=True)
    fresh.fit(1)

def test_columns():
    rows = []
    learn = small_learner()
    learn.logger = lambda r: rows.append(list(r))
    learn.fit(2, cbs=HBACallback())
    assert learn.recorder.metric_names[3:-1]==['accuracy','hyper_loss','mean_p','mean_mag','skipped','leading']
    assert all(len(r)==len(learn.recorder.metric_names) for r in rows)
    hyper,p,mag,skipped = rows[-1][4:8]
    assert 0<hyper<10 and 0<p<1 and 0<mag<1 and skipped==0 and len(learn.metrics)==1

def test_policy_acts_between_scaling_and_normalisation_on_training_batches_only():
    x,y = digits(12)
    norm = Normalize.from_stats([0.3]*3, [0.2]*3)
    dls = array_dls((x[:200],y[:200]), (x[200:300],y[200:300]), vocab=range(10), bs=20, batch_tfms=[*aug_transforms(do_flip=False), norm])
    learn,seen = small_learner(dls=dls),{}
    class See(Callback):
        order = 60
        def before_batch(self):
            seen.setdefault(self.training, [t.order for t in self.dl.after_batch.fs if not isinstance(t, type(None))])
            if self.training: seen['fill'] = self.learn.hba.bound.parts[0].fill
    learn.fit(1, cbs=[HBACallback(), See()])
    assert seen[True]==[9,10,30,40,99] and seen[False]==[10,30,40,99] and torch.allclose(seen['fill'], torch.full((3,), 0.3))

def test_images_of_different_sizes_in_batches_of_one():
    items = [(TensorImage(torch.rand(3, 8+i%3, 8+i%4)),TensorCategory(i%2)) for i in range(24)]
    dls = DataLoaders.from_dsets(items[:16], items[16:], bs=1, num_workers=0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    learn,hba = Learner(dls, net, loss_func=CrossEntropyLossFlat()),HBACallback()
    with learn.no_bar(),learn.no_logging(): learn.fit(1, cbs=hba)
    assert len(hba.lam.series)==3

def test_a_course_without_a_hyper_step_is_said_beforehand():
    with pytest.warns(UserWarning, match=r'too short for a hyper-step \(1 × 2 optimizer steps\)'): small_learner(n_train=40).fit(1, cbs=HBACallback())

@pytest.mark.parametrize('kw,says', [({}, 'λ moves at once'), (dict(target=True), 'λ is frozen since, so nothing is searched')])
def test_a_fit_behind_the_course_says_so(kw, says):
    "And the two fits of `fine_tune` say nothing"
    learn = small_learner()
    hba = HBACallback(**{k: learn.dls.valid for k in kw})
    learn.fine_tune(2, cbs=hba)
    with pytest.warns(UserWarning, match=f'goes on from the last fit: {says}'): learn.fit(1, cbs=hba)
    hba.forget()
    learn.fit(1, cbs=hba)
    assert hba.schedule.progress.tolist()[-1]==1 and len(hba.points)==2

@pytest.mark.parametrize('epoch,target,says', [(0,False,'λ moves from epoch 1.2 of 5'), (2,False,'λ moves at once'), (0,True,'λ moves from epoch 1.2 of 5'),
                                               (3,True,'λ is frozen since')])
def test_a_fit_behind_one_that_was_stopped_says_where_it_stands(epoch, target, says):
    class Stop(Callback):
        order = 70
        def after_epoch(self):
            if self.epoch==epoch: raise KeyboardInterrupt
    learn = small_learner()
    hba = HBACallback(target=learn.dls.valid if target else None)
    with pytest.raises(KeyboardInterrupt): learn.fit(4, cbs=[hba,Stop()])
    with pytest.warns(UserWarning, match=f'goes on from the last fit: {says}'): learn.fit(4, cbs=hba)

def test_object_goes_on_over_two_fits():
    learn,hba = small_learner(),HBACallback()
    learn.fit(1, cbs=hba)
    lam,v = hba.lam.value.clone(),hba.net.layers[0].V['weight'].detach().clone()
    seen = {}
    class See(Callback):
        order = 30
        def before_train(self):
            seen.setdefault('lam', self.learn.hba.lam.value.clone())
            seen.setdefault('v', self.learn.hba.net.layers[0].V['weight'].detach().clone())
    with pytest.warns(UserWarning, match='goes on from the last fit'): learn.fit(3, cbs=[hba, See()])
    assert torch.equal(seen['lam'], lam) and torch.equal(seen['v'], v)
    assert hba.schedule.progress.tolist()==pytest.approx([0,0.3/4,0.25,0.5,0.75,1]) and hba.schedule.provenance['epochs']==4

@pytest.mark.parametrize('n', [1,5])
def test_replay_is_stretched(n):
    lam,seen = torch.stack([torch.full((54,), v) for v in (-5.,5.)]),[]
    class See(Callback):
        order = 40
        def before_batch(self):
            if self.training: seen.append((self.learn.schedule.tfms[0].lam_i.mean().item(), self.learn.pct_train))
    learn = small_learner()
    learn.fit(n, cbs=[ScheduleCallback(Schedule([0,1], PBASpace().values(lam)), sigma=0.), See()])
    want = Schedule([0,1], PBASpace().values(lam))
    for (l,pct),i in zip(seen, range(10*n)):
        assert abs(pct-i/(10*n))<1e-6 and abs(l-want.lam(i/(10*n)).mean())<1e-2

def test_export_without_hba_fastai(tmp_path):
    from fastai.vision.all import ImageDataLoaders
    x,y = digits(16)
    from PIL import Image
    for i in range(60):
        d = tmp_path/'im'/str(y[i].item()%2); d.mkdir(parents=True, exist_ok=True)
        Image.fromarray(x[i].permute(1,2,0).numpy()).save(d/f'{i}.png')
    dls = ImageDataLoaders.from_folder(tmp_path/'im', valid_pct=0.3, seed=1, bs=8, num_workers=0)
    learn = small_learner(dls=dls, model=small_net(n=2))
    learn.fit(1, cbs=HBACallback())
    assert len(learn.hba_schedule)==3
    code = f"""import sys,warnings; warnings.simplefilter('ignore')
sys.modules['hba_fastai'] = None # importing it fails
from fastai.vision.all import load_learner
l = load_learner({str(tmp_path/'e.pkl')!r})
print(len(l.predict({str(next((tmp_path/'im').rglob('*.png')))!r})[2]))"""
    learn.logger = print # a function of this test module would need it too
    learn.export(tmp_path/'e.pkl')
    r = subprocess.run([sys.executable,'-c',code], capture_output=True, text=True, cwd=tmp_path)
    assert r.stdout.strip().endswith('2'), r.stderr[-2000:]

# --- refusals: one sentence, and the Learner usable afterwards

def torch_dls():
    ds = torch.utils.data.TensorDataset(torch.rand(40,3,12,12), torch.randint(0,10,(40,)))
    return DataLoaders(*[torch.utils.data.DataLoader(ds, batch_size=20) for _ in range(2)])

def tensor_dls():
    from fastai.data.core import TfmdDL
    ds = [(torch.rand(3,12,12), torch.tensor(i%10)) for i in range(40)]
    return DataLoaders(*[TfmdDL(ds, bs=20, num_workers=0) for _ in range(2)])

def no_valid(): return DataLoaders(digits_dls(200, 100, bs=20, size=12).train, device='cpu')
def empty_valid():
    x,y = digits(12)
    return array_dls((x[:200],y[:200]), (x[:0],y[:0]), vocab=range(10), bs=20)

def normalised_early():
    norm = Normalize.from_stats([0.3]*3, [0.2]*3); norm.order = 15
    x,y = digits(12)
    x = x.float() # bytes would be augmented before
    return array_dls((x[:200],y[:200]), (x[:100],y[:100]), vocab=range(10), bs=20, batch_tfms=[norm])

@pytest.mark.parametrize('dls,error,match', [
    (torch_dls,TypeError,'batch transform and DataLoader has none'), (tensor_dls,TypeError,'needs images'), (no_valid,ValueError,'need a validation set'),
    (empty_valid,ValueError,'need a validation set'), (normalised_early,ValueError,r'float images in \[0,1\]')])
def test_data_that_do_not_fit(dls, error, match):
    from fastai.losses import CrossEntropyLossFlat
    learn = small_learner(dls=dls(), loss_func=CrossEntropyLossFlat())
    before = [len(list(p)) for p in [learn.model.parameters()]],list(learn.cbs)
    with pytest.raises(error, match=match): learn.fit(1, cbs=HBACallback())
    assert before==([len(list(learn.model.parameters()))],list(learn.cbs)) and all('forward' not in vars(m) for m in learn.model.modules())
    if 'valid' not in match: learn.fit(1)

def test_a_model_without_batch_norm():
    model = nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8,10))
    learn = small_learner(model=model)
    match = "'first_bn' matches no layer of Sequential, whose layers are: 1 Conv2d, 1 Linear"
    with pytest.raises(ValueError, match=match): learn.fit(1, cbs=HBACallback('first_bn'))
    learn.fit(1, cbs=(hba:=HBACallback())) # which finds the convolution
    assert hba.schedule.provenance['layers']==['0']

@pytest.mark.parametrize('kw', [
    dict(T_train=0), dict(T_val=0), dict(T_train=1.5), dict(moves=0), dict(moves=1.5), dict(share=0), dict(share=1.1),
    dict(sigma=-1), dict(sigma=float('nan')), dict(hlr=0), dict(condition='x'),
    dict(start=0), dict(start=1.2), dict(start={'Invert_0.p': 1.01}), dict(start={'Invert_0.p': -0.1}), dict(start={'Inwert_0.p': 0.1}),
    dict(start={'Rotate_0.m': 31}), dict(exploit='worst'), dict(exploit='best', sigma=0), dict(population_size=1)])
def test_arguments_that_do_not_fit(kw):
    with pytest.raises(ValueError): HBACallback(**kw)

def test_a_grey_and_a_five_channel_search():
    for c in (1,5):
        x,y = digits(12)
        x = x[:,:1].repeat(1,c,1,1)
        dls = array_dls((x[:200],y[:200]), (x[200:300],y[200:300]), vocab=range(10), bs=20)
        learn,hba = small_learner(dls=dls, model=small_net(c)),HBACallback()
        with pytest.warns(UserWarning, match='Color needs RGB') as w: learn.fit(2, cbs=hba)
        assert len([o for o in w if 'Color' in str(o.message)])==1
        d = hba.schedule.frame()
        assert all(d[f'Color_{i}.{k}'].nunique()==1 for i in (0,1) for k in 'pm') and d['Invert_0.p'].nunique()==3

def test_hba_schedule_of_a_learner_without_one():
    with pytest.raises(ValueError, match='has no schedule'): small_learner().hba_schedule

def test_lambda_is_frozen_while_the_response_is_learned():
    learn,hba = small_learner(),HBACallback(warmup=0.5, seed=0)
    learn.fit(4, 1e-2, cbs=hba)
    t = hba.schedule.table
    assert torch.equal(t[0],t[1]) and not torch.equal(t[1],t[3])
    with pytest.warns(UserWarning, match='goes on from the last fit'): learn.fit(2, 1e-2, cbs=hba) # the response is there already
    assert not torch.equal(hba.schedule.table[4], hba.schedule.table[5])

@pytest.mark.parametrize('floor', [0.02,0.001])
def test_no_hyperparameter_falls_below_the_floor(floor):
    learn,hba = small_learner(),HBACallback(floor=floor, hlr=1., pull=0., warmup=0, start={'Invert_0.p': 0.01}, seed=0)
    learn.fit(3, 1e-2, cbs=hba)
    u = hba.lam.value.sigmoid()
    low = torch.tensor([min(floor, s) for s in PBASpace().start({'Invert_0.p': 0.01}).sigmoid().tolist()])
    assert (u>=low-1e-6).all() and (u<2*low).any() # a step of 1 goes there

def test_a_joint_second_moment_keeps_small_gradients_small():
    from hba_fastai.lam import adam,adam_start
    lam,g = torch.zeros(3),torch.tensor([1.,0.01,0.])
    step = lambda joint: -adam(lam, g, adam_start(lam), 0.1, [3] if joint else None)[0]
    assert torch.allclose(step(False), torch.tensor([0.1,0.1,0.])) and torch.allclose(step(True)/step(True)[0], g)

def test_report_names_what_stands_out_from_noise(capsys):
    learn,hba = small_learner(),HBACallback(seed=0)
    with pytest.raises(ValueError, match='none was computed'): hba.report()
    learn.fit(3, 1e-2, cbs=hba)
    g = torch.randn(200,54, generator=torch.Generator().manual_seed(0))
    hba.lam.series = list(g)
    df = hba.report()
    assert len(df)==15 and not df.named.any() and 'No operation stands out' in capsys.readouterr().out
    assert df.signal.abs().max()<2 # the copies are independent here, which makes 1.4 standard deviations of 2
    g[:,[6,21]] -= 0.8 # Invert: more of it helps; 200 of these make a signal of sqrt(200)*0.8/sqrt(1.64) = 8.8, and 6 are needed
    hba.lam.series = list(g)
    df = hba.report()
    assert df.index[0]=='Invert' and list(df.index[df.named])==['Invert'] and 'more Invert' in capsys.readouterr().out

def test_noise_that_all_operations_share_names_none():
    from hba_fastai.evidence import evidence
    space,rng = PBASpace(),torch.Generator().manual_seed(0)
    named = lambda g: list((d := evidence(g, space, space.start(), space.start())).index[d.named])
    slow = torch.randn(15, generator=rng).repeat(2) # one draw for all steps, the same for both copies
    g = torch.cat([slow+0.5*torch.randn(200,30, generator=rng), torch.zeros(200,24)], 1)
    d = evidence(g, space, space.start(), space.start())
    assert d.signal.max()>10 and not named(g) # signals that the old threshold of 2 took for real
    g[:,:30] += 3. # less of everything, but for one
    g[:,[4,19]] = -5.
    assert named(g)==['Rotate']
    g[:,[4,19]] = 0. # no pull at all is no reason, however far the others fall
    assert not named(g)

def test_few_operations_have_to_be_surer():
    from hba_fastai.evidence import NAMED,standing
    one = lambda s: standing({'noise': s, 'dark': 0.})['noise']
    assert one(10.)<NAMED<one(19.) and one(-19.)<0

def test_the_preset_is_the_papers_setting():
    hba = HBACallback.paper(seed=3, T_train=4)
    assert (hba.strategy,hba.condition,hba.centred,hba.warmup,hba.joint,hba.seed,hba.T_train)==('first_bn','lambda',False,0.,False,3,4)
    assert torch.allclose(hba.lam.value, PBASpace().start(0.05)) and hba.lam.lowest.unique()==-15 and hba.lam.highest==15 and hba.hlr==0.03
    small_learner().fit(1, cbs=hba)

class Short(PBAPolicy):
    name = 'PBAPolicy' # draws the same
    def scale(self, sigma): return 1.

def test_longer_features_are_a_faster_response():
    "Features √5 times as long are, under SGD, a response that learns five times as fast"
    class Faster(HBACallback):
        def after_backward(self):
            super().after_backward()
            for l in self.net.layers:
                for v in l.V.values(): v.grad *= self.times
    def found(times, policy):
        hba = Faster(seed=0, warmup=0., policy=policy); hba.times = times
        learn = small_learner(opt_func=lambda ps,lr: SGD(ps, lr, mom=0.9))
        learn.fit(2, 1e-2, cbs=hba)
        return hba.lam.value
    lam = found(1, PBAPolicy())
    assert torch.allclose(lam, found(5, Short()), atol=1e-5) and not torch.allclose(lam, found(1, Short()), atol=1e-2)

@pytest.mark.parametrize('kw', [dict(sigma='1'), dict(hlr='x'), dict(floor='a'), dict(warmup=None), dict(start='x'), dict(start=(0.1,)),
    dict(start={'Invert_0.p': 'x'}), dict(limits=[1]), dict(policy=PBAPolicy), dict(policy=3), dict(seed='a'), dict(hyper_loss=3)])
def test_arguments_of_another_kind_are_named(kw):
    with pytest.raises((TypeError,ValueError), match=f"{next(iter(kw))}|is no policy"): HBACallback(**kw)

def test_a_policy_of_ones_own_is_checked_before_the_first_step():
    class Signed(Policy):
        space = Space(bright=(0,0.5))
        def draw(self, v, generator): return v.bright*(2*torch.rand(len(v), generator=generator)-1)
        def dose(self, drawn): return drawn[:,None]
        def apply(self, x, drawn, generator): return (x+drawn[:,None,None,None]).clamp(0,1)
    learn = small_learner()
    with pytest.raises(ValueError, match='The expected dose of Signed does not move with bright'): learn.fit(1, cbs=HBACallback(policy=Signed()))
    learn.fit(1, cbs=PolicyCallback(Signed())) # what is not searched need not move
