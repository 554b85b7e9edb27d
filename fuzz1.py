from common import *
warnings.simplefilter('ignore')
from weakspot import attacks, regions, Linf, L2, L1, SSIM
m=mk(); x=imgs(2); y=m(x).argmax(1)
import inspect
bad_images={'list':[1],'none':None,'3d':x[0],'1d':x.flatten(),'empty':x[:0],'nan':x*float('nan'),'int':(x*255).byte(),'numpy':x.numpy(),'complex':x+0j,'bool':x>0.5,'f64':x.double(),'f16':x.half(),'bf16':x.bfloat16(),'noncontig':x.permute(0,1,3,2),'grad':x.clone().requires_grad_(),'5d':x[None],'1chan':x[:,:1],'zeroh':x[:,:,:0],'expand':x[:1,:1].expand(2,3,16,16), 'neg':-x, 'sparse':x.to_sparse()}
with torch.inference_mode(): bad_images['infer']=x.clone(); bad_images['infer']*=1
bad_labels={'none':None,'list':[0,1],'minus1':torch.tensor([-1,0]),'big':torch.tensor([0,9]),'float':y.float(),'bool':y>0,'short':y[:1],'2d':y[:,None],'int32':y.int(),'u8':y.byte(),'int':1,'np':y.numpy()}
fns={n:getattr(attacks,n) for n in attacks.available_attacks() if hasattr(attacks,n)}
print(list(attacks.available_attacks()), attacks.__all__)
quick={'steps':2,'queries':20,'evaluations':20,'popsize':4,'iterations':2}
def run(f,im,lb,**kw):
    sig=inspect.signature(f).parameters
    q={k:v for k,v in quick.items() if k in sig}
    return f(m,im,lb,**q,**kw)
reg={'weak_spots':lambda im,lb:weakspot.weak_spots(m,im,lb,grid=2),'smallest_square':lambda im,lb:weakspot.smallest_square(m,im,lb,budget=Linf(0.1)),
'class_activation':lambda im,lb:weakspot.class_activation(m,im,lb),'occlusion':lambda im,lb:weakspot.occlusion(m,im,lb),
'cam':lambda im,lb:regions.cam(m,im,lb),'certify_pixels':lambda im,lb:weakspot.certify_pixels(m,im,lb,region=torch.zeros(1,1,16,16,dtype=torch.bool),seconds=1),
'certify_patches':lambda im,lb:weakspot.certify_patches(m,im,lb,masks=2),
'Pairs.of':lambda im,lb:weakspot.Pairs.of(m,im,im,lb),
'background':lambda im,lb:regions.background(im,model=m,classes=lb),
'superp':lambda im,lb:regions.superpixels(im), 'border':lambda im,lb:regions.border(im,width=2),
'LocalEdits':lambda im,lb:weakspot.LocalEdits(m,im[:1]),
'DM':lambda im,lb:weakspot.DoubleMasking(m,masks=2)(im),
'matched':lambda im,lb:regions.matched(x[:,:1]>0.5,images=im),
'read_region':lambda im,lb:regions.read_region('border:2',m,im,lb) ,
}
for n,f in fns.items(): reg['attack '+n]=lambda im,lb,f=f:run(f,im,lb)
for n,f in reg.items():
    for k,v in bad_images.items():
        r=attempt(n,lambda:f(v,y))
        if r[0]=='RAW' or (r[0]=='ok' and k in('list','none','3d','1d','empty','nan','int','numpy','complex','bool','5d','zeroh','sparse')): print(n,'images',k,r)
    for k,v in bad_labels.items():
        if n in('superp','border','LocalEdits','DM','matched'): continue
        r=attempt(n,lambda:f(x,v))
        if r[0]=='RAW' or (r[0]=='ok' and k in('none','list','minus1','big','float','bool','short','2d','int','np')): print(n,'labels',k,r)
