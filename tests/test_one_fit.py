"One fit with target images: they steer λ, and join training when it no longer moves; in every flow, and nothing is left behind"
import re
from functools import partial
import pytest, torch
from torch import Tensor
from fastai.callback.core import Callback,CancelFitException
from fastai.data.block import DataBlock
from fastai.data.transforms import IndexSplitter,get_image_files
from fastai.torch_core import params
from fastai.vision.augment import Resize,aug_transforms
from fastai.vision.core import PILImage
from fastai.vision.data import BBoxBlock,BBoxLblBlock,ImageBlock,ImageDataLoaders
from conftest import small_learner
from hba_fastai.all import HBACallback,Policy,PolicyCallback,Schedule,ScheduleCallback,TrivialAugmentWide
from hba_fastai.checkpoint import CheckpointError
from hba_fastai.data import digits
from hba_fastai.lam import Hyperparameters
from hba_fastai.space import Space

class Identity(Policy):
    "Nothing is done to an image, so that it can be found again"
    def draw(self, v, generator): pass
    def apply(self, x, drawn, generator): return x

class Still(Identity):
    "The same, with a hyperparameter"
    space,checked = Space(still=(0,1)),True
    def draw(self, v, generator): return v.still
    def dose(self, drawn): return drawn[:,None]

class Watch(Callback):
    "What each training batch had: images that are the target's, wrong labels, λ"
    order = 30
    def __init__(self, target, of=lambda: torch.zeros(1)):
        self.known,self.of,self.seen = {o.tobytes(): int(y) for o,y in zip(target.dataset.x.numpy(), target.dataset.y)},of,[]
    def before_batch(self):
        if not self.training: return
        names = [(o*255).round().byte().numpy().tobytes() for o in self.xb[0].as_subclass(torch.Tensor)]
        labels = [self.known.get(o) for o in names]
        wrong = sum(a is not None and a!=b for a,b in zip(labels, self.yb[0].tolist()))
        self.seen.append((self.learn.pct_train, len(names), sum(o is not None for o in labels), wrong, self.of().clone()))

def fitted(cb, epochs=5, **kw):
    learn = small_learner(n_valid=60)
    watch = Watch(learn.dls.valid, **kw)
    learn.fit(epochs, 1e-2, cbs=[cb(learn.dls.valid), watch])
    return learn,watch.seen

@pytest.mark.parametrize('until,mix', [(0.6,0.5), (0.,0.25), (0.8,0.1)])
def test_target_images_come_late_with_their_labels(until, mix):
    learn,seen = fitted(lambda dl: PolicyCallback(Identity(), target=dl, until=until, mix=mix))
    assert {n for _,n,*_ in seen}=={20} and not any(wrong for *_,wrong,_ in seen)
    assert [k for p,_,k,*_ in seen]==[round(20*mix) if p>=until-1e-9 else 0 for p,*_ in seen]

def test_no_leak():
    "The weights meet target images only when λ no longer moves, and λ moved before"
    learn,late = small_learner(n_valid=60),[]
    hba = HBACallback(target=learn.dls.valid, hlr=0.1, seed=0)
    class Look(Callback):
        order = 14 # in front of the search
        def before_batch(self):
            if self.training: self.before,self.lam_then = self.xb[0],hba.lam.value.clone()
    class Compare(Callback):
        order = 16
        def before_batch(self):
            if self.training: late.append((self.learn.pct_train, self.xb[0] is not self.look.before, self.look.lam_then))
    learn.fit(5, 1e-2, cbs=[hba, Look(), Compare()])
    mixed = [m for _,m,_ in late]
    assert mixed==[p>=0.6-1e-9 for p,*_ in late] and sum(mixed)==20
    lams = [l for *_,l in late]
    first = mixed.index(True)
    assert not torch.equal(lams[0], lams[first]) and all(torch.equal(l, lams[first]) for l in lams[first:]) and torch.equal(hba.lam.value, lams[first])
    at = hba.schedule.at
    assert torch.equal(at(0), at(0.3)) and not torch.equal(at(0.3), at(0.6)) and torch.equal(at(0.6), at(1))

def test_fine_tune_is_one_course():
    "The share counts over both fits: 1 + 4 epochs, of which the last two have target images"
    learn = small_learner(n_valid=60)
    learn.splitter = lambda m: [params(m[:4]),params(m[4:])]
    learn.create_opt()
    watch = Watch(learn.dls.valid)
    learn.fine_tune(4, 1e-2, cbs=[PolicyCallback(Identity(), target=learn.dls.valid), watch])
    assert [k for _,_,k,*_ in watch.seen]==[0]*30+[10]*20
    hba = HBACallback(target=learn.dls.valid, seed=0)
    learn.fine_tune(4, 1e-2, lr_mult=1, cbs=hba)
    assert hba.clock.wait==1.5 and hba.clock.until==3 and hba.schedule.progress[-1]==1

class Early(Callback):
    "Ends a fit behind epoch `n`, once"
    def __init__(self, n): self.n = n
    def after_epoch(self):
        if self.epoch+1==self.n: self.n = None; raise CancelFitException

@pytest.mark.parametrize('how', ['a shorter fit','fine_tune'])
def test_what_ends_early_is_a_shorter_course(how):
    "Images join as much earlier, and the schedule can be replayed"
    learn = small_learner(n_valid=60)
    learn.splitter = lambda m: [params(m[:4]),params(m[4:])]
    learn.create_opt()
    hba,watch = HBACallback(policy=Still(), target=learn.dls.valid, seed=0),Watch(learn.dls.valid)
    if how=='fine_tune': learn.fine_tune(3, 1e-2, freeze_epochs=7, lr_mult=1, cbs=[hba, Early(2), watch])
    else:
        learn.fit(10, 1e-2, cbs=[hba, Early(2), watch])
        learn.fit(3, 1e-2, cbs=[hba, watch])
    p = hba.schedule.provenance
    assert (p['epochs'],p['until'],p['warmup'])==(5,0.6,0.4) and [k for _,_,k,*_ in watch.seen]==[0]*30+[10]*20
    assert ScheduleCallback(hba, policy=Still(), target=learn.dls.valid).until==0.6

def test_a_schedule_is_reused_with_target_images(tmp_path):
    learn = small_learner(n_valid=60)
    learn.fit(5, 1e-2, cbs=HBACallback(target=learn.dls.valid, seed=0))
    learn.hba_schedule.save(tmp_path/'s.json')
    class Count(ScheduleCallback):
        mixed = []
        def before_batch(self):
            x = self.learn.xb[0]
            super().before_batch()
            self.mixed.append(self.learn.xb[0] is not x)
    other,_ = fitted(lambda dl: Count(tmp_path/'s.json', target=dl, seed=1), epochs=10)
    assert len(other.dls.train.after_batch.fs)==1 and Count.mixed==[False]*60+[True]*40
    assert Schedule.load(tmp_path/'s.json').provenance['until']==0.6

def test_a_replay_lets_target_images_join_as_the_search_did(tmp_path):
    learn = small_learner(n_valid=60)
    learn.fit(5, 1e-2, cbs=HBACallback(target=learn.dls.valid, seed=0, warmup=0.2, until=0.4, mix=0.25))
    file = learn.hba_schedule.save(tmp_path/'s.json')
    form = lambda **kwargs: [vars(ScheduleCallback(file, **kwargs))[k] for k in ('until','mix')]
    assert form(target=learn.dls.valid)==[0.4,0.25] and form(target=learn.dls.valid, mix=0.3)==[0.4,0.3] and form()==[0.6,0.5]
    learn.fit(3, 1e-2, cbs=HBACallback(seed=0)) # to whose schedule no images joined
    assert [getattr(ScheduleCallback(learn, target=learn.dls.valid), k) for k in ('until','mix')]==[0.6,0.5]

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    "Digits in folders: 60 to train on, named by words, and 30 of the target, of five of the classes"
    root,(x,y) = tmp_path_factory.mktemp('f'),digits(16)
    for part,sl,classes in (('train',slice(0,100),10), ('target',slice(100,200),5)):
        for i,(o,c) in enumerate(zip(x[sl], y[sl])):
            if c>=classes: continue
            (root/part/f'digit{int(c)}').mkdir(parents=True, exist_ok=True)
            PILImage.create(o.permute(1,2,0).numpy()).save(root/part/f'digit{int(c)}'/f'{i}.png')
    return root

@pytest.mark.filterwarnings('ignore:.*has no image of 5 of 10 classes')
@pytest.mark.parametrize('form', ['folder','files','loader','torch'])
def test_every_form_of_target(folders, form):
    dls = ImageDataLoaders.from_folder(folders/'train', valid_pct=0.3, seed=1, bs=8, num_workers=0, item_tfms=Resize(14), batch_tfms=aug_transforms(size=12))
    files = get_image_files(folders/'target')
    test = dls.test_dl(files, with_labels=True)
    b = [(x.as_subclass(Tensor),y.as_subclass(Tensor)) for x,y in test]
    whole = torch.utils.data.TensorDataset(*[torch.cat(o) for o in zip(*b)])
    target = dict(folder=folders/'target', files=list(files), loader=test, torch=torch.utils.data.DataLoader(whole, 4, shuffle=True))[form]
    learn,got = small_learner(dls=dls),[]
    class Labels(Callback):
        order = 20
        def before_batch(self): got.append((self.training, self.learn.pct_train, self.yb[0][4:], type(self.xb[0]), self.xb[0].shape))
    fs,of_target = list(dls.train.after_batch.fs),list(test.after_batch.fs)
    learn.fit(5, 1e-2, cbs=[PolicyCallback(TrivialAugmentWide(), target=target), Labels()])
    late = [o for o in got if o[0] and o[1]>=0.6-1e-9]
    early = [o for o in got if o[0] and o[1]<0.5]
    assert late and all((y<5).all() and t is early[0][3] and s==early[0][4] for _,_,y,t,s in late)
    assert list(dls.train.after_batch.fs)==fs and list(test.after_batch.fs)==of_target

def test_augmented_as_training_images_are(folders):
    "The user's random transforms and the policy act on target images; the same image comes different each time"
    dls = ImageDataLoaders.from_folder(folders/'train', valid_pct=0.3, seed=1, bs=8, num_workers=0, item_tfms=Resize(16), batch_tfms=aug_transforms())
    one = [next(iter(get_image_files(folders/'target')))]
    learn,got = small_learner(dls=dls),[]
    class Take(Callback):
        order = 20
        def before_batch(self):
            if self.training: got.append(self.xb[0][7].clone())
    cbs = [PolicyCallback(Identity(), target=one, until=0.),Take()]
    with pytest.warns(UserWarning, match='the network unlearns them, so add some'): learn.fit(1, 0., cbs=cbs)
    assert len(got)>3 and len({o.numpy().tobytes() for o in got})==len(got)

@pytest.mark.parametrize('kw,match', [(dict(target=0.2), 'target=0.2 is a number'), (dict(target=[]), 'target is an empty list'),
    (dict(target=''), 'target is an empty name'), (dict(target='no/such'), "target='no/such' does not exist"), (dict(until=1.), 'until=1.0'),
    (dict(mix=0.), 'mix=0.0'), (dict(mix=1.), 'mix=1.0'), (dict(until=-0.1), 'until=-0.1')])
def test_bad_input(kw, match):
    for make in (HBACallback, partial(PolicyCallback, Identity())):
        with pytest.raises((ValueError,TypeError), match=re.escape(match)): make(**kw)

def test_bad_pairs():
    dl = small_learner().dls.valid
    with pytest.raises(ValueError, match='of target images and no target is given'): HBACallback(until=0.5)
    with pytest.raises(ValueError, match='of target images and no target is given'): PolicyCallback(Identity(), mix=0.1)
    with pytest.raises(ValueError, match='valid and target both say'): HBACallback(valid=0.2, target=dl)
    with pytest.raises(ValueError, match='until must be the larger'): HBACallback(target=dl, until=0.3)

def test_no_batch_for_target_images_is_refused():
    learn = small_learner(n_valid=60) # 10 batches
    with pytest.raises(ValueError, match='until=0.95 leaves none of the 10 training batches'): learn.fit(1, cbs=HBACallback(target=learn.dls.valid, until=0.95))

def test_a_loader_of_its_own_with_small_batches_is_named():
    learn = small_learner(n_valid=60)
    ds = torch.utils.data.TensorDataset(learn.dls.valid.dataset.x/255, learn.dls.valid.dataset.y)
    own = torch.utils.data.DataLoader(ds, 4, sampler=torch.utils.data.WeightedRandomSampler([1.]*60, 60))
    with pytest.warns(UserWarning, match='gives batches of 4 and each training batch takes 10 of its images'):
        learn.fit(1, cbs=PolicyCallback(Identity(), target=own))

def test_what_is_said_of_the_target_images_is_true(capsys):
    "Only where they have joined; and few hyper-steps are named"
    learn = small_learner(n_valid=60)
    def stop(self):
        if self.learn.epoch==2: raise CancelFitException
    for cbs,said in (([],True), ([Callback(after_batch=stop)],False)):
        hba = HBACallback(target=learn.dls.valid, seed=0)
        learn.fit(5, 1e-2, cbs=[hba, *cbs])
        hba.report()
        out = capsys.readouterr().out
        assert ('target images took 50% of each batch' in out)==said and f"{len(hba.lam.series)} hyper-step" in out

def test_a_target_and_validation_data_are_not_one_search(tmp_path):
    learn = small_learner(n_valid=60, path=tmp_path)
    learn.fit(1, cbs=HBACallback(valid=learn.dls.valid, checkpoint='s'))
    with pytest.raises(CheckpointError, match='joins'): learn.fit(1, cbs=HBACallback(target=learn.dls.valid, checkpoint='s', resume=True))

def test_the_literal_form_is_the_plain_network_when_target_images_join():
    "Un-centred layers hold φ0 while λ is searched; from `until` on they hold θ̂(λ) and respond to nothing, as the model that is handed back"
    learn,rows = small_learner(n_valid=60),[]
    hba = HBACallback.paper(target=learn.dls.valid, hlr=0.1, seed=0)
    class Look(Callback):
        order = 20
        def before_batch(self):
            if self.training and hba.is_late() and not rows:
                x = self.xb[0].as_subclass(Tensor)
                self.learn.model.eval()
                with torch.no_grad(): inside = self.learn.model(x)
                hba.plain_network()
                with torch.no_grad(): rows.append(torch.equal(inside, self.learn.model(x)))
                self.learn.model.train()
    learn.fit(5, 1e-2, cbs=[hba, Look()])
    x = learn.dls.one_batch()[0].as_subclass(Tensor)
    assert rows==[True] and hba.lam.series and all('forward' not in vars(m) for m in learn.model.modules()) and learn.model.eval()(x).isfinite().all()

def test_boxes_are_refused_before_the_first_step(folders):
    files = get_image_files(folders/'train')[:8]
    boxes = lambda f: [[0,0,4,4]]*(1+int(f.stem)%3)
    get_y = [boxes,lambda f: ['a']*len(boxes(f))]
    block = DataBlock((ImageBlock,BBoxBlock,BBoxLblBlock), n_inp=1, get_y=get_y, splitter=IndexSplitter([0,1]), item_tfms=Resize(16))
    learn = small_learner(dls=block.dataloaders(files, bs=2, num_workers=0))
    learn.loss_func,before = (lambda p,*y: p.sum()),[o.clone() for o in learn.model.parameters()]
    with pytest.raises(ValueError, match='a number of boxes of its own: use `valid` instead'):
        learn.fit(1, cbs=PolicyCallback(Identity(), target=learn.dls.valid))
    assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

@pytest.mark.parametrize('callback', [partial(PolicyCallback, Identity()), HBACallback])
def test_target_images_of_another_size_are_refused_before_the_first_step(folders, callback):
    dls = ImageDataLoaders.from_folder(folders/'train', valid_pct=0.3, seed=1, bs=8, num_workers=0) # 16 pixels, without a Resize
    for i,f in enumerate(get_image_files(folders/'target')[:8]):
        (folders/'large'/f.parent.name).mkdir(parents=True, exist_ok=True)
        PILImage.create(f).resize((24,24)).save(folders/'large'/f.parent.name/f'{i}.png')
    learn = small_learner(dls=dls)
    before = [o.clone() for o in learn.model.parameters()]
    with pytest.warns(UserWarning, match='unlearns them|says nothing'), pytest.raises(ValueError, match=r'24\) and training \(3, 16, 16\) to one batch'):
        learn.fit(1, cbs=callback(target=folders/'large'))
    assert all(torch.equal(a, b) for a,b in zip(before, learn.model.parameters()))

def test_a_folder_of_parts_is_refused(folders):
    dls = ImageDataLoaders.from_folder(folders/'train', valid_pct=0.3, seed=1, bs=8, num_workers=0, item_tfms=Resize(14))
    root = folders/'parts'
    for part in ('train','test'):
        (root/part/'digit1').mkdir(parents=True, exist_ok=True)
        for i,f in enumerate(get_image_files(folders/'target'/'digit1')[:3]): PILImage.create(f).save(root/part/'digit1'/f'{i}.png')
    with pytest.raises(ValueError, match='has folders test, train where those of classes should be: give one of them'):
        small_learner(dls=dls).fit(1, cbs=HBACallback(target=root))

def test_more_than_8_bits_are_refused(folders):
    from PIL import Image
    import numpy as np
    dls = ImageDataLoaders.from_folder(folders/'train', valid_pct=0.3, seed=1, bs=8, num_workers=0, item_tfms=Resize(14))
    (folders/'deep'/'digit1').mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((16,16), 40000, np.uint16)).save(folders/'deep'/'digit1'/'a.png')
    with pytest.raises(ValueError, match='more than 8 bits per colour'): small_learner(dls=dls).fit(1, cbs=HBACallback(target=folders/'deep'))

@pytest.mark.filterwarnings('ignore:.*has no image of 9 of 10 classes')
def test_target_images_of_different_sizes(folders):
    (folders/'sizes'/'digit0').mkdir(parents=True, exist_ok=True)
    for n in (16,18): PILImage.create(torch.randint(255, (n,n,3), dtype=torch.uint8).numpy()).save(folders/'sizes'/'digit0'/f'{n}.png')
    dls = ImageDataLoaders.from_folder(folders/'train', valid_pct=0.3, seed=1, bs=8, num_workers=0)
    with pytest.raises(ValueError, match='make images of one size, `item_tfms=Resize'): small_learner(dls=dls).fit(1, cbs=HBACallback(target=folders/'sizes'))

@pytest.mark.parametrize('event', ['before_batch','after_batch','after_epoch'])
def test_stopped_while_target_images_train(event):
    "Ctrl-C: loaders, callbacks and model are as they were, and the same object goes on"
    learn = small_learner(n_valid=60)
    fs,hba = list(learn.dls.train.after_batch.fs),HBACallback(target=learn.dls.valid, seed=0)
    def stop(self):
        if self.learn.epoch==3 and (self.training or event=='after_epoch'): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit(5, 1e-2, cbs=[hba, Callback(**{event: stop})])
    assert hba.late is None and hba.stream is None and list(learn.dls.train.after_batch.fs)==fs
    assert all('forward' not in vars(m) for m in learn.model.modules())
    with pytest.warns(UserWarning, match='goes on from the last fit: λ is frozen'): learn.fit(5, 1e-2, cbs=hba)
    assert hba.late is None

def test_resume_bit_for_bit_while_target_images_train(tmp_path):
    class Stop(Callback):
        def before_batch(self):
            if self.training and self.learn.epoch==4 and self.learn.iter==3: raise RuntimeError('power cut')
    def search(learn, *cbs, **more):
        hba = HBACallback(target=learn.dls.valid, seed=5, **more)
        learn.fit(6, 1e-2, cbs=[hba, *cbs])
        return hba
    whole = small_learner(n_valid=60, path=tmp_path)
    a = search(whole)
    with pytest.raises(RuntimeError, match='power cut'): search(small_learner(n_valid=60, path=tmp_path), Stop(), checkpoint='s')
    other = small_learner(seed=9, n_valid=60, path=tmp_path)
    b = search(other, checkpoint='s', resume=True)
    assert torch.equal(a.schedule.table, b.schedule.table)
    for k,v in whole.model.state_dict().items(): assert torch.equal(v, other.model.state_dict()[k]), k

def test_the_pull_settles_where_the_gradients_agree():
    "A gradient that never changes has m/√v = 1, so λ settles 1/pull below its start; without a pull it goes on to the bound"
    g = torch.tensor([1.,-1.,0.])
    def ends(pull):
        lam = Hyperparameters(torch.tensor([0.5,0.,0.]), torch.full((3,), -6.), pull=pull)
        for _ in range(400): lam.step(g, 0.1)
        return lam.value
    torch.testing.assert_close(ends(0.5), torch.tensor([0.5-2, 2., 0.]), atol=1e-4, rtol=0)
    torch.testing.assert_close(ends(0.), torch.tensor([-6., 7., 0.]))
