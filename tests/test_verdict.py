"A verdict by folds: who sees which image, what is counted and said, and what is left as it was"
import random,re
import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.mixup import MixUp
from fastai.learner import Learner
from fastai.vision.all import ImageDataLoaders,Normalize,Resize
from PIL import Image
from conftest import small_net
from hba_fastai import verdict
from hba_fastai.data import array_dls,digits
from hba_fastai.folds import FoldedImages,folds_of
from hba_fastai.pba import PBAPolicy
from hba_fastai.replay import PolicyCallback
from hba_fastai.verdict import AS_IT_IS,FINE_TUNING,Verdict,hba_verdict,mcnemar,wilson

VOCAB = list('0123456789')
X,Y = digits(12)

def test_a_class_may_be_called_train(tmp_path):
    names = 'car','train'
    for i in range(24):
        f = tmp_path/('lab' if i<12 else 'field')/names[i%2]/f'{i}.png'
        f.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(X[i].permute(1,2,0).numpy()).save(f)
    dls = ImageDataLoaders.from_folder(tmp_path/'lab', valid_pct=0.3, seed=0, bs=4, num_workers=0, item_tfms=Resize(12))
    assert FoldedImages(Learner(dls, small_net(n=2)), tmp_path/'field', 2, 0).n==12

@pytest.mark.parametrize('name', [AS_IT_IS,FINE_TUNING])
def test_an_arm_has_a_name_of_its_own(root, name):
    with pytest.raises(ValueError, match=f"arms has '{name}', which is judged in any case"):
        hba_verdict(learner, root/'target', fit=fit, arms={name: lambda target: PolicyCallback(PBAPolicy(), target=target)})

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    "Digits as files: training images, and 31 target images under a folder per class"
    d = tmp_path_factory.mktemp('verdict')
    for part,idxs in (('train', range(60)), ('target', range(200, 231))):
        for i in idxs:
            f = d/part/VOCAB[Y[i]]/f'{i}.png'
            f.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(X[i].permute(1,2,0).numpy()).save(f)
    return d

def learner(**kwargs):
    "A new Learner for digits in memory"
    dls = array_dls((X[:80],Y[:80]), (X[80:100],Y[80:100]), vocab=VOCAB, bs=20, device='cpu')
    return Learner(dls, small_net(), **kwargs)

def halves(m): return [list(m[:3].parameters()),list(m[3:].parameters())]

def fit(learn, cbs): learn.fit(2, 1e-2, cbs=cbs)

def seen_in(dl):
    "The pictures of a loader, as bytes"
    return {x.numpy().tobytes() for xb,_ in dl for x in xb.as_subclass(torch.Tensor)}

class Late(Callback):
    "Stands in for an arm: trains on the target batches too, and notes what it has seen"
    def __init__(self, target): self.target = target
    def before_train(self): self.it = iter(self.target.train)
    def before_batch(self):
        if not self.training or (b := next(self.it, None)) is None: return
        self.learn.xb,self.learn.yb = (torch.cat([self.xb[0].as_subclass(torch.Tensor), b[0].as_subclass(torch.Tensor)]),), \
                                      (torch.cat([self.yb[0].as_subclass(torch.Tensor), b[1].as_subclass(torch.Tensor)]),)

class Pictures(Callback):
    "Notes the pictures that a Learner is trained on"
    order,run_valid = 100,False
    def before_batch(self):
        self.learn.fed = getattr(self.learn, 'fed', set()) | {x.numpy().tobytes() for x in self.xb[0].as_subclass(torch.Tensor)}

# --- folds

@pytest.mark.parametrize('k', [2,3,5,10])
def test_folds_have_the_classes_in_proportion(k):
    y = np.random.default_rng(k).permutation(np.repeat(range(4), [17,9,5,1]))
    fold = folds_of(y, k, seed=3)
    sizes = np.bincount(fold, minlength=k)
    assert len(fold)==32 and sizes.max()-sizes.min()<=1
    for c in range(4):
        n = np.bincount(fold[y==c], minlength=k)
        assert n.max()-n.min()<=1
    assert (folds_of(y, k, seed=4)!=fold).any() and (folds_of(y, k, seed=3)==fold).all()

def test_each_image_is_tested_once_and_never_by_what_was_trained_on_it(root, monkeypatch):
    seen,plain = [],verdict.wrong_on # of each network: the pictures that it was trained on, and those that test it
    monkeypatch.setattr(verdict, 'wrong_on', lambda learn, dl: (seen.append((learn.fed,seen_in(dl))),plain(learn, dl))[1])
    hba_verdict(lambda: learner(cbs=Pictures()), root/'target', k=4, fit=fit, arms={'late': Late, 'later': Late}, seed=1)
    every = seen[0][1]
    assert len(every)==31 and not seen[0][0] & every # the network as it is
    for arm in range(3): # fine-tuning and two callbacks
        fits = seen[1+4*arm:5+4*arm]
        assert sorted(len(tested) for _,tested in fits)==[7,8,8,8]
        assert set.union(*(tested for _,tested in fits))==every
        if not arm: continue # it goes on with one Learner, see the next test
        for fed,tested in fits: assert not fed & tested and fed & every==every-tested

def test_fine_tuning_begins_with_the_same_network_in_each_fold_and_sees_the_others_alone(root, monkeypatch):
    starts,fed,tested = [],[],[]
    class Watch(Callback):
        def before_fit(self):
            starts.append(self.learn.model[0].weight.detach().clone())
            fed.append(set())
        def before_batch(self):
            if self.training: fed[-1] |= {x.numpy().tobytes() for x in self.xb[0].as_subclass(torch.Tensor)}
    plain = verdict.wrong_on
    monkeypatch.setattr(verdict, 'wrong_on', lambda learn, dl: (tested.append(seen_in(dl)),plain(learn, dl))[1])
    hba_verdict(lambda: learner(cbs=Watch()), root/'target', k=3, fit=lambda learn, cbs: learn.fit(10, 1e-2, cbs=cbs), arms={})
    assert len(starts)==4 and torch.equal(starts[1], starts[2]) and torch.equal(starts[1], starts[3]) and not torch.equal(starts[0], starts[1])
    for a,b in zip(fed[1:], tested[1:]): assert a and a<=tested[0] and not a & b

def test_fine_tuning_takes_a_tenth_of_the_steps_at_a_tenth_of_each_rate(root):
    fits = []
    class Watch(Callback):
        order,run_valid = 70,False
        def before_fit(self): fits.append([])
        def after_batch(self): fits[-1].append([h['lr'] for h in self.opt.hypers])
    hba_verdict(lambda: learner(cbs=Watch(), splitter=halves), root/'target', k=2, arms={},
                fit=lambda learn, cbs: learn.fit_one_cycle(15, slice(1e-3, 1e-2), cbs=cbs))
    whole,*short = map(np.array, fits)
    assert len(whole)==60 and [len(o) for o in short]==[6,6]
    for o in short: assert 0.5<(o.max(0)/(whole.max(0)/10)).min() and (o.max(0)/(whole.max(0)/10)).max()<=1+1e-9 # six steps need not meet the top

def test_files_give_the_verdict_of_their_folder(root):
    "Labels of files come from their folders, images are read by the Learner's own pipeline, and a fit may be two"
    def make():
        dls = ImageDataLoaders.from_folder(root/'train', valid_pct=0.3, seed=1, bs=10, num_workers=0, item_tfms=Resize(12),
                                           batch_tfms=Normalize.from_stats([0.3]*3, [0.3]*3, cuda=False), device='cpu')
        return Learner(dls, small_net(), splitter=halves)
    tune = lambda learn, cbs: learn.fine_tune(1, cbs=cbs)
    files = sorted((root/'target').rglob('*.png'))
    a,b = (hba_verdict(make, target, k=2, fit=tune, arms={'late': Late}) for target in (root/'target',files))
    assert len(files)==31 and all((a.wrong[arm]==b.wrong[arm]).all() for arm in (AS_IT_IS,FINE_TUNING,'late'))

def test_wrong_predictions_are_those_of_the_network(root):
    learn = learner()
    images = FoldedImages(learn, root/'target', 3, seed=0)
    got = verdict.wrong_on(learn, images.loader(learn, range(31)))
    x = torch.stack([torch.tensor(np.array(Image.open(f))).permute(2,0,1)/255 for f in images.files])
    y = torch.tensor([int(f.parent.name) for f in images.files])
    assert (got==(learn.model.eval()(x).argmax(1)!=y).numpy()).all() and 0<got.sum()

# --- what is counted and said

def test_intervals_are_wilsons():
    "Newcombe (1998), Table I, method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29"
    for (e,n),ends in {(81,263): (.2553,.3662), (15,148): (.0624,.1605), (0,20): (0,.1611), (1,29): (.0061,.1718)}.items():
        assert wilson(e, n)==pytest.approx(ends, abs=5e-5)
    assert wilson(20, 20)==pytest.approx((1-.1611, 1), abs=5e-5)

def test_a_difference_is_judged_by_the_images_on_which_two_arms_disagree():
    a,b = np.zeros((2,40), bool)
    a[:9] = b[8:10] = True # 8 wrong in one alone, 1 in the other, 1 in both
    assert mcnemar(a, b)==mcnemar(b, a)==pytest.approx(2*(1+9)/2**9)
    assert mcnemar(a, a)==1 and mcnemar(np.zeros(1000, bool), np.arange(1000)<800)<1e-100

def up_to(n): return np.arange(50)<n

def test_a_verdict_in_words():
    v = Verdict({AS_IT_IS: up_to(22), FINE_TUNING: up_to(16), 'late': up_to(14), 'HBA': up_to(11)})
    assert (v.use,v.next_best)==('HBA','late')
    assert v.words()==("Not decided, but ahead is HBA: 44% -> 22% on 50 images held out (95% 13-35); late 28%: "
                       "the difference is within what 50 images can tell (p = 0.25)") # three against none: 2/2³
    assert Verdict({AS_IT_IS: up_to(40), 'a': up_to(30), 'b': up_to(5)}).words().endswith("a 60%: the difference is more than chance gives (p < 0.001)")
    close = Verdict({AS_IT_IS: up_to(5), 'a': up_to(6)}).words()
    assert close.startswith("Not decided, but ahead is the network as it is: 10% on 50 images held out (95% 4-21); a 12%")
    level = Verdict({AS_IT_IS: up_to(5), 'a': up_to(3), 'b': up_to(3)})
    assert level.use=='a', "of equal ones the first is the simpler"
    assert level.words()=="Not decided, b is level with a: 10% -> 6% on 50 images held out (95% 2-16)"
    assert v.table.columns.tolist()=='arm errors n error low high'.split()
    assert v.table.iloc[3].tolist()==['HBA',11,50,22.,*(pytest.approx(100*o) for o in wilson(11, 50))]
    assert v.words() in repr(v) and 'fine-tuning' in repr(v)

def test_a_page_shows_names_as_text():
    page = Verdict({AS_IT_IS: up_to(5), '<b>&': up_to(3)})._repr_html_()
    assert '<b>' not in page and page.count('&lt;b&gt;&amp;')==2

def test_it_says_beforehand_how_many_fits_and_how_few_images(root, capsys):
    hba_verdict(learner, root/'target', k=4, fit=fit, arms={'late': Late})
    plan,margin,rare,*lines = capsys.readouterr().out.splitlines()
    assert plan=="31 target images of 10 classes in 4 folds: 5 whole fits (1 without them, 4 with late) and 4 a tenth as long (fine-tuning)"
    assert margin=="An error of 25% on 31 images may be 14-43% (95%)" # 8 of 31
    counts = np.bincount([int(f.parent.name) for f in (root/'target').rglob('*.png')], minlength=10)
    few = [f'{c} ({n})' for c,n in enumerate(counts) if n<4]
    assert few and rare.startswith(f"Classes with fewer images than folds, which some folds do not test: {few[0]}")
    assert len(lines)==9 and re.fullmatch(r'The network as it is: \d+ of 31 wrong, about \d+ s to go', lines[0])
    assert re.fullmatch(r'late, fold 4 of 4: \d of 7 wrong', lines[8])

def test_classes_without_an_image_are_named(root, capsys):
    files = [f for f in (root/'target').rglob('*.png') if f.parent.name not in '37']
    hba_verdict(learner, files, k=2, fit=fit, arms={'late': Late})
    assert 'Classes without an image, which nothing tests: 3, 7' in capsys.readouterr().out

# --- what is left as it was

def test_ctrl_c_goes_on_and_what_is_finished_is_said(root, capsys):
    def late(target): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): hba_verdict(learner, root/'target', k=2, fit=fit, arms={'first': Late, 'late': late, 'last': late})
    out = capsys.readouterr().out
    assert 'Stopped, without late, last; what is finished, in percent' in out
    table = out.split('in percent:')[1]
    assert all(arm in table for arm in (AS_IT_IS,FINE_TUNING,'first')) and ' 31 ' in table
    def stop(learn, cbs): raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): hba_verdict(learner, root/'target', fit=stop, arms={'late': late})
    assert capsys.readouterr().out.splitlines()[-1]=='Stopped, without the network as it is, fine-tuning, late'

def test_random_streams_and_loaders_of_the_user_are_as_before(root):
    dls = array_dls((X[:60],Y[:60]), (X[60:80],Y[60:80]), vocab=VOCAB, bs=20, device='cpu')
    def state(): return random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()
    def look(): return [(dl.rng.getstate(),list(dl.after_batch.fs),vars(dl).keys()) for dl in dls.loaders]
    def interrupted(target): raise KeyboardInterrupt
    before,loaders = state(),look()
    def make(): random.random(); np.random.rand(); return Learner(dls, small_net())
    a,b = (hba_verdict(make, root/'target', k=2, fit=fit, arms={'late': Late}, seed=3) for _ in range(2))
    assert all((a.wrong[arm]==b.wrong[arm]).all() for arm in a.wrong)
    with pytest.raises(KeyboardInterrupt): hba_verdict(make, root/'target', k=2, fit=fit, arms={'late': interrupted})
    assert state()==before and look()==loaders

def test_arms_begin_with_the_same_weights_and_see_the_same_batches_within_a_fold(root):
    begun = []
    class Watch(Callback):
        order,run_valid = -100,False
        def before_fit(self): self.new = True
        def before_batch(self):
            if self.new: begun.append((self.learn.model[0].weight.detach().clone(),self.xb[0].as_subclass(torch.Tensor).clone()))
            self.new = False
    hba_verdict(lambda: learner(cbs=Watch()), root/'target', k=2, fit=fit, arms={'a': lambda target: Callback(), 'b': lambda target: Callback()})
    (plain,_,_,a0,a1,b0,b1) = begun
    for o,p in ((plain,a0), (a0,b0), (a1,b1)): assert all(map(torch.equal, o, p))
    assert not torch.equal(a0[0], a1[0]) and not torch.equal(a0[1], a1[1])

# --- what it refuses

def refused(kind, message, make=learner, target=None, **kwargs):
    with pytest.raises(kind) as e: hba_verdict(make, target, **{'fit': fit, 'arms': {'late': Late}, **kwargs})
    text = str(e.value)
    assert message in text and text.count('. ')==0, text

def test_what_it_refuses_in_one_sentence(root, tmp_path):
    target,files = root/'target',sorted((root/'target').rglob('*.png'))
    learn,model = learner(),small_net()
    refused(ValueError, 'gives the same Learner twice', lambda: learn, target)
    refused(ValueError, 'gives the same model twice', lambda: Learner(learner().dls, model), target)
    refused(TypeError, 'make_learner gives a Sequential', small_net, target)
    refused(TypeError, 'target is a ArrayDL, and folds are made of single image files', target=learn.dls.valid)
    refused(ValueError, 'has 9 images and a verdict needs 10 or more', target=files[:9])
    refused(ValueError, 'k=1 is the number of folds', target=target, k=1)
    refused(ValueError, 'from 2 to 31', target=target, k=32)
    copy = tmp_path/'3'/'copy.png'
    copy.parent.mkdir()
    copy.write_bytes(files[0].read_bytes())
    refused(ValueError, '1 of 32 target images are copies of others', target=[*files,copy])
    refused(ValueError, 'fit trains without the callbacks', target=target, fit=lambda learn, cbs: learn.fit(1))
    refused(TypeError, 'arms is no dictionary of functions', target=target, arms=[Late])
    refused(ValueError, 'has PolicyCallback and the arms bring their own', lambda: learner(cbs=PolicyCallback(PBAPolicy())), target)
    refused(ValueError, 'MixUp mixes images', lambda: learner(cbs=MixUp()), target, arms=None)

def test_a_search_too_short_is_said(root, capsys):
    dls = lambda: ImageDataLoaders.from_folder(root/'train', valid_pct=0.2, seed=1, bs=10, num_workers=0, item_tfms=Resize(12), device='cpu')
    short = dict(make_learner=lambda: Learner(dls(), small_net()), target=root/'target', k=2, fit=lambda learn, cbs: learn.fit(4, cbs=cbs))
    hba_verdict(**short, arms={'HBA': verdict.ARMS['HBA']})
    assert re.search(r'The search had \d hyper-steps?, too few to make an operation stand out', capsys.readouterr().out)

def test_target_images_that_are_training_images_are_named(root):
    def make():
        dls = ImageDataLoaders.from_folder(root/'train', valid_pct=0.2, seed=1, bs=10, num_workers=0, item_tfms=Resize(12), device='cpu')
        return Learner(dls, small_net())
    with pytest.warns(UserWarning, match='are training images too'): hba_verdict(make, root/'train', k=2, fit=fit, arms={})
