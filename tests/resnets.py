"""Small residual networks whose modules are called as torchvision's, and some that only look so."""

from torch import nn


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, channels, width, stride=1, shortcut="downsample"):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.add_module(shortcut, beside(channels, width, stride))

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        beside = self._modules.get("downsample") or self._modules.get("shortcut")
        return self.relu(y + (x if beside is None else beside(x)))


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(self, channels, width, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, groups=2, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = beside(channels, 4 * width, stride)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(self.relu(self.bn2(self.conv2(y)))))
        return self.relu(y + (x if self.downsample is None else self.downsample(x)))


class Preactivated(BasicBlock):
    """Its norms come first."""

    def __init__(self, channels, width, stride=1):
        super().__init__(channels, width, stride)
        self.bn1 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.conv1(self.relu(self.bn1(x)))
        y = self.conv2(self.relu(self.bn2(y)))
        return y + (x if self.downsample is None else self.downsample(x))


class Scaled(BasicBlock):
    """It halves its branch."""

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y / 2 + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    def __init__(self, block=BasicBlock, width=4, stages=2):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.stages = stages
        channels = width
        for i in range(1, stages + 1):
            first = block(channels, i * width, stride=min(i, 2))
            channels = i * width * block.expansion
            self.add_module(f"layer{i}", nn.Sequential(first, block(channels, i * width)))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for i in range(1, self.stages + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(self.avgpool(x).flatten(1))


def beside(channels, width, stride):
    """The other branch, where x is not it."""
    if stride == 1 and channels == width:
        return None
    return nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
