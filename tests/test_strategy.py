"Which layers 'auto' takes, in networks of many families and under the heads of fastai"
import pytest, torch
from fastai.vision.learner import create_timm_model,create_unet_model,create_vision_model
from fastai.vision.models.xresnet import xresnet18
from timm import create_model
from timm.layers import GroupNormAct,StdConv2d
from timm.models.convnext import ConvNeXt
from timm.models.resnetv2 import ResNetV2
from timm.models.swin_transformer import SwinTransformer
from torch import nn
from torch.nn.utils import prune
from torchvision import models
from torchvision.models.convnext import CNBlockConfig
from hba_fastai.hypernet import HyperNet
from hba_fastai.layers import executed,foldable,select

def tv_convnext(): return models.convnext.ConvNeXt([CNBlockConfig(8,16,1), CNBlockConfig(16,None,1)], num_classes=4)
def tv_vit(): return models.VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=4)
def tv_swin(): return models.SwinTransformer([4,4], 16, [1,1], [2,2], [4,4], num_classes=4)
def timm_convnext(**kw): return ConvNeXt(depths=(1,1,1,1), dims=(8,8,16,16), num_classes=4, **kw)
def bit(**kw):
    return ResNetV2([1,1,1,1], channels=(128,)*4, stem_chs=32, conv_layer=StdConv2d, norm_layer=GroupNormAct, num_classes=4, **kw)
def headed(body, n):
    head = nn.BatchNorm1d(n),nn.Linear(n,64),nn.ReLU(),nn.BatchNorm1d(64),nn.Linear(64,4)
    return nn.Sequential(body, nn.AdaptiveAvgPool2d(1), nn.Flatten(), *head)

BN = { # networks with batch norm: side of the image, network
    'resnet18': (32, lambda: models.resnet18(num_classes=4)), 'mobilenet_v3_small': (32, lambda: models.mobilenet_v3_small(num_classes=4)),
    'efficientnet_b0': (32, lambda: models.efficientnet_b0(num_classes=4)), 'densenet121': (32, lambda: models.densenet121(num_classes=4)),
    'timm resnet10t': (32, lambda: create_model('resnet10t', num_classes=4)),
    'timm mobilenet': (32, lambda: create_model('mobilenetv3_small_050', num_classes=4)),
    'xresnet18': (32, lambda: xresnet18(n_out=4)), 'vision_learner resnet18': (32, lambda: create_vision_model(models.resnet18, 4, pretrained=False)),
    'unet_learner': (64, lambda: create_unet_model(models.resnet18, 4, (64,64), pretrained=False)),
    'one block': (16, lambda: headed(nn.Sequential(nn.Conv2d(3,16,3), nn.BatchNorm2d(16)), 16))}
OTHERS = { # side, network, layer
    'convnext': (32, tv_convnext, 'features.0.1'), 'vit': (32, tv_vit, 'encoder.layers.encoder_layer_0.ln_1'), 'swin': (32, tv_swin, 'features.0.2'),
    'timm convnext': (32, timm_convnext, 'stem.1'), 'timm vit': (32, lambda: create_model('vit_tiny_patch16_224', img_size=32), 'blocks.0.norm1'),
    'timm swin': (32, lambda: SwinTransformer(32, 4, embed_dim=16, depths=(1,1), num_heads=(2,2), window_size=4), 'patch_embed.norm'),
    'timm cait': (32, lambda: create_model('cait_xxs24_224', img_size=32), 'blocks.0.norm1'),
    'timm mixer': (32, lambda: create_model('mixer_s32_224', img_size=32), 'blocks.0.norm1'),
    'timm bit': (32, bit, 'stages.0.blocks.0.norm1'), 'timm nf_resnet26': (32, lambda: create_model('nf_resnet26', num_classes=4), 'stem.conv'),
    'vision_learner convnext': (32, lambda: headed(tv_convnext().features, 16), '0.0.1'),
    'vision_learner timm convnext': (32, lambda: create_timm_model('convnext_atto', 4, pretrained=False)[0], '0.model.stem.1'),
    'vision_learner timm vit': (32, lambda: create_timm_model('vit_tiny_patch16_224', 4, pretrained=False, img_size=32)[0], '0.model.blocks.0.norm1'),
    'vision_learner timm nf_resnet26': (32, lambda: create_timm_model('nf_resnet26', 4, pretrained=False)[0], '0.model.stem.conv'),
    'squeezenet': (64, lambda: models.squeezenet1_0(num_classes=4), 'features.0')}

def batch(side): return (torch.rand(2,3,side,side),)

@pytest.mark.parametrize('name', BN)
def test_auto_is_first_bn_in_networks_with_batch_norm(name):
    side,make = BN[name]
    model = make()
    auto,bn = (select(model, batch(side), s).layers for s in ('auto','first_bn'))
    assert auto==bn and isinstance(auto[0][1], nn.BatchNorm2d)

@pytest.mark.parametrize('name', OTHERS)
def test_auto_takes_an_early_layer_of_the_body(name):
    side,make,layer = OTHERS[name]
    torch.manual_seed(0)
    model,x = make().eval(),batch(side)
    layers,reason = select(model, x)
    assert [n for n,_ in layers]==[layer] and reason.startswith(f'`{layer}` ') and reason.isascii()
    net = HyperNet(layers, 3)
    with torch.no_grad(),net.attached(torch.zeros(3)): # and it responds, row by row, as the fold does
        for l in net.layers:
            for p in l.V.values(): nn.init.normal_(p, std=0.1)
        for p in model.parameters(): p.add_(0.05*torch.randn_like(p)) # heads and layer scales that start at 0 hide the response
        plain,z = model(*x),torch.randn(2,3)
        net.respond(z)
        y = model(*x)
        net.respond(None)
        net.move_to(z[1])
        moved = model(*x)
    same = lambda i: torch.allclose(y[i], moved[i], rtol=1e-3, atol=1e-5)
    assert (moved-plain).abs().max()>1e-4 and same(1) and not same(0)

@pytest.mark.parametrize('strategy', ['first_bn','bn','first_linear','the last'])
def test_layers_in_the_last_tenth_come_with_a_warning(strategy):
    model = headed(tv_convnext().features[:2], 8)
    if strategy=='first_linear': # no linear layer before the head
        for i in (3,5): model[0][1][0].block[i] = nn.Identity()
    with pytest.warns(UserWarning, match='sees next to nothing of the network: `[347]` .*; [0-9]% of'):
        select(model, batch(32), [model[7]] if strategy=='the last' else strategy)

@pytest.mark.parametrize('model,match', [
    (nn.Sequential(nn.Flatten(), nn.Linear(192,4)), 'auto.*finds no normalisation layer or convolution .* in Sequential, whose layers are: 1 Linear'),
    (headed(nn.Sequential(StdConv2d(3,64,3), StdConv2d(64,64,3)), 64), 'auto.*whose layers are: 2 BatchNorm1d, 2 Linear')])
def test_auto_refuses_a_network_without_an_early_layer(model, match):
    with pytest.raises(ValueError, match=match): select(model, batch(8))

def test_auto_leaves_layers_out_that_see_another_batch():
    class Pieces(nn.Module):
        def forward(self, x): return x.unflatten(3, (2,-1)).movedim(3, 1).flatten(0, 1)
    class Together(nn.Module):
        def forward(self, x): return x.unflatten(0, (-1,2)).sum(1)
    body = nn.Sequential(nn.Conv2d(3,8,3,padding=1), nn.GroupNorm(1,8), nn.Conv2d(8,8,3,padding=1))
    model = nn.Sequential(Pieces(), nn.BatchNorm2d(3), nn.Conv2d(3,3,1), Together(), body)
    assert [n for n,_ in select(model, batch(8)).layers]==['4.1']
    with pytest.raises(ValueError, match='`1` sees a batch of 4 where the model got 2'): select(model[:3], batch(8))

def test_work_counts_what_comes_after_a_layer():
    model = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.Conv2d(4,4,3), nn.Flatten(), nn.Linear(64,6), nn.LayerNorm(6), nn.Linear(6,5))
    conv,first,last = 16*4*4*9,64*6,6*5 # of 4×4 pixels
    want = [1, 1, (first+last)/(conv+first+last), last/(conv+first+last), last/(conv+first+last), 0]
    assert [r.after for r in executed(model, batch(8))]==pytest.approx(want)

class Doubled(nn.LayerNorm):
    "A normalisation layer that does more to its weight than multiply by it"
    def forward(self, x): return nn.functional.layer_norm(x, self.normalized_shape, self.weight**2, self.bias, self.eps)

class Within(nn.Conv2d):
    "A convolution with its norm within, as detectron2's"
    def __init__(self, *args):
        super().__init__(*args)
        self.norm = nn.BatchNorm2d(self.out_channels)
    def forward(self, x): return self.norm(super().forward(x))

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.a,self.b,self.c = (nn.Conv2d(3,3,1) for _ in range(3))
        self.b.weight = self.a.weight
    def forward(self, x): return self.c(self.b(input=self.a(x))).mean((2,3))

def pruned():
    layer = nn.BatchNorm2d(4)
    prune.random_unstructured(layer, 'bias', 0.5)
    return layer

def test_layers_whose_response_would_not_be_their_fold():
    of = lambda m: [r.name for r in executed(m, (torch.rand(2,3,8,8),))]
    assert of(nn.Sequential(Within(3,4,3), nn.Conv2d(4,4,1)))==['0.norm','1']
    assert of(Tied())==['c']
    assert of(nn.Sequential(nn.Conv2d(3,4,1), pruned()))==['0']

def test_a_layer_is_seen_that_is_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.norm = nn.Conv2d(3,4,1),nn.BatchNorm2d(4)
        def forward(self, x): return self.norm(input=self.conv(x)).mean((2,3))
    net,x = Net(),torch.rand(2,3,8,8)
    assert [r.name for r in executed(net, (x,))]==['conv','norm']
    with HyperNet([('norm',net.norm)], 2).attached(torch.zeros(2)) as hyper:
        hyper.respond(torch.ones(2,2))
        assert net(x).shape==(2,4)

def test_what_hangs_on_a_layer_is_not_copied():
    conv,learner = nn.Conv2d(3,4,3),open(__file__)
    conv.register_forward_hook(lambda *_: learner.name) # copied with the hook it could not be
    conv.learner = learner
    old = conv.weight.detach().clone()
    layer, = HyperNet([('conv',conv)], 2).layers
    assert layer.U['weight'].shape==conv.weight.shape and torch.equal(conv.weight, old) and not torch.equal(layer.U['weight'], old)
    learner.close()

def test_a_class_whose_fold_is_not_its_response_is_no_hyper_layer():
    x = torch.rand(2,3,8,8)
    ln = Doubled(8)
    nn.init.uniform_(ln.weight, 0.5, 2)
    assert not foldable(ln, x) and foldable(nn.LayerNorm(8), x) and not foldable(StdConv2d(3,4,3), x)
    with pytest.raises(ValueError, match='none that can be one'): select(nn.Sequential(ln, StdConv2d(3,4,3)), (x,), 'all')
