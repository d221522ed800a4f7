"""What the networks of a detector cannot know: a class for each stage, whose fields say what they mean.

The same classes check the JSON in an export's files, are what the functions of postprocess.py take, and are what
sources/ fill in. All numbers are pixels of the resized picture unless a comment says otherwise.
"""

from typing import Any, Dict, Literal, Optional, Tuple

import msgspec
from typing_extensions import Annotated

FORMAT = 2  # of the metadata

Count = Annotated[int, msgspec.Meta(ge=1, le=10**6)]
Number = Annotated[float, msgspec.Meta(ge=-1e6, le=1e6)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Positive = Annotated[float, msgspec.Meta(ge=1e-6, le=1e6)]
Natural = Annotated[int, msgspec.Meta(ge=0, le=1000)]
# Control characters would break a line or a terminal; lone surrogates crash OpenCV.
Text = Annotated[str, msgspec.Meta(pattern=r"^[^\x00-\x1f\x7f-\x9f\ud800-\udfff]*\Z")]
FourNumbers = Tuple[Number, Number, Number, Number]
Boxes = Annotated[Tuple[FourNumbers, ...], msgspec.Meta(min_length=1)]
Counts = Annotated[Tuple[Count, ...], msgspec.Meta(min_length=1)]
Positives = Annotated[Tuple[Positive, ...], msgspec.Meta(min_length=1)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What all settings are: typed and immutable; in the JSON, those that have their usual value are left out."""


class Header(msgspec.Struct):
    """What says how to read the rest of the metadata."""

    format: int = 0
    type: str = ""


class Preprocess(Settings, kw_only=True):
    """How a picture becomes the input of the first network."""

    scale: Optional[Tuple[Count, Count]]  # upper limits of its long and of its short side; None: it keeps its size
    keep_ratio: bool = True  # False: resized to exactly this width and height
    normalize_first: bool = False  # normalised, then resized in float32, sides rounded down; False: see preprocess
    mean: Tuple[Number, Number, Number]  # of each channel, 0 to 255: subtracted, then divided by std
    std: Tuple[Positive, Positive, Positive]
    to_rgb: bool  # the network takes red first; OpenCV reads blue first
    pad_divisor: Count  # height and width are padded to multiples of it
    pad_to_square: bool = False  # both are padded to the longer one first
    pad_value: Number = 0  # what the network takes there
    canvas: Natural = 0  # above 0: pictures keep their size, in the middle of black, see in_the_middle

    def __post_init__(self):
        """Check what no single field can."""
        if self.canvas and self.scale is not None:
            raise ValueError("with a canvas, pictures keep their size, so scale has to be null")


class Anchors(Settings, kw_only=True):
    """The boxes that stand at every cell; strides and base sizes are one per level, the finest first."""

    strides: Counts  # distance between two neighbouring cells
    base_sizes: Positives  # an anchor's area is (base size * scale)^2
    scales: Positives
    ratios: Positives  # height / width
    center_offset: Number  # from a cell's upper left corner to the centre of its anchors, in base sizes
    rounded: bool = False  # the first cell's anchors have their corners at whole pixels
    strides_of_maps: bool = False  # cells are as far apart as their map's side divides the input's, see map_stride

    def __post_init__(self):
        """Check what no single field can."""
        if len(self.base_sizes) != len(self.strides):
            raise ValueError(f"{len(self.strides)} strides, but {len(self.base_sizes)} base sizes")


class Coder(Settings, kw_only=True):
    """What deltas mean, see decode_boxes."""

    means: FourNumbers  # a box moves by (deltas * stds + means)
    stds: FourNumbers
    shrinks_freely: bool = False  # a box may become as small as its deltas say; False: 16/1000 of it at least


class Suppression(Settings, kw_only=True):
    """What all stages do with boxes once they have them: drop the poor ones, run NMS, keep the best."""

    score_threshold: Number = -1  # boxes are dropped unless their score is above it
    iou_threshold: Share  # of NMS, level by level (proposals) or class by class (detections)
    nms_class_agnostic: bool = False  # NMS runs over the boxes of all classes together
    nms_first_group: Natural = 0  # what NMS calls the first level or class, see moved_apart
    nms_moved_up_to: Optional[Count] = None  # they are moved apart for no more boxes than this; None: always
    soft_min_score: Optional[Number] = None  # Soft-NMS: below it a box is removed
    max_per_img: Count  # at most this many boxes are kept, the best


class Stage(Suppression, kw_only=True):
    """What both stages of a two-stage detector do with boxes: move them first, and drop those that are too small."""

    means: FourNumbers  # these three: as in Coder
    stds: FourNumbers
    shrinks_freely: bool = False
    min_bbox_size: Number = -1  # boxes with a side that is not longer are dropped; below 0: none are


class Proposals(Stage, kw_only=True):
    """From the RPN's maps to proposals."""

    anchors: Anchors
    softmax: bool = False  # the RPN gives an anchor two logits, object and background, instead of one
    nms_pre: int  # how many anchors of each level are decoded, best first; below 1: all
    rank_logits: bool = False  # the best by their logits, of which fewer are equal than of the scores


class RoIs(Settings, kw_only=True):
    """From proposals to features of one size."""

    strides: Counts  # of the levels that RoIs read, the finest first
    finest_scale: Positive  # RoIs below twice this size read the finest level
    output_size: Count  # bins per side
    sampling_ratio: Natural  # points of a bin along each axis; 0: its length in cells, rounded up
    aligned: bool  # a cell's value stands at its centre (False: at its corner, as before Detectron2)


class Head(Stage, kw_only=True):
    """From the second network's outputs to detections."""

    class_agnostic: bool  # one set of deltas for all classes, instead of one for each
    score_threshold: Number  # a class is dropped unless its score is above it
    nms_resized: bool = False  # NMS sees boxes in pixels of the resized picture; False: of the picture as it came in
    multiplied_back: bool = False  # boxes are multiplied by original / resized size; False: divided, see rescale


class Refinement(Coder, kw_only=True):
    """From the RoIs of one stage of a cascade to those of the next."""

    class_agnostic: bool  # one set of deltas for all classes, instead of one for each


class Masks(Settings, kw_only=True):
    """From detections to their masks."""

    rois: RoIs
    class_agnostic: bool = False  # one mask for all classes, instead of one for each
    threshold: Number  # a pixel is in the mask where its score is not below
    bordered: bool = False  # boxes grow by a border of zeros around the mask, and to whole pixels, see with_border


class Points(Settings, kw_only=True):
    """From coarse masks to fine ones, see point_rend.py."""

    steps: Count  # how often a mask is doubled
    num_points: Count  # how many of its points are predicted anew each time


class CellAnchors(Settings, kw_only=True):
    """The anchors of a one-stage detector; strides and boxes are one per level, the finest first."""

    strides: Positives  # distance between two neighbouring cells
    boxes: Annotated[Tuple[Boxes, ...], msgspec.Meta(min_length=1)]  # the anchors of the first cell, in the upper left
    strides_of_maps: bool = False  # cells are as far apart as their map's side divides the input's, see map_stride

    def __post_init__(self):
        """Check what no single field can."""
        if len(self.boxes) != len(self.strides):
            raise ValueError(f"{len(self.strides)} strides, but {len(self.boxes)} lists of boxes")


class CellPoints(Settings, kw_only=True):
    """The points of a one-stage detector without anchors, one in every cell; level by level, the finest first."""

    strides: Counts  # distance between two neighbouring points
    offset: Number  # from a cell's upper left corner to its point, in strides
    units: Positives  # how many pixels a distance of 1 is
    exponential: bool = False  # the network predicts the distances' logarithms
    bins: Natural = 0  # a distance is the mean of a distribution over 0, 1, ... bins - 1; 0: it is predicted as such
    strides_of_maps: bool = False  # points are as far apart as their map's side divides the input's, see map_stride
    last_pixel: bool = False  # boxes end at the centres of the last pixels, not at the picture's border

    def __post_init__(self):
        """Check what no single field can."""
        if len(self.units) != len(self.strides):
            raise ValueError(f"{len(self.strides)} strides, but {len(self.units)} units")


class Dense(Suppression, kw_only=True):
    """From the maps of a one-stage detector to detections."""

    score_threshold: Number  # a class is dropped unless its score is above it
    nms_pre: int  # how many candidates of each level (of PAA: priors) are decoded, best first; below 1: all
    nms_pre_per_class: Optional[Count] = None  # how many of each class, of all levels, NMS sees; None: all
    softmax: bool = False  # the classes and the background, the last, compete; False: each class has its own sigmoid
    one_class: bool = False  # a prior is a candidate for its best class alone, the one with the largest logit
    factor: Text = ""  # the name of a map whose sigmoid is a factor of all classes' scores, such as centerness
    combined: Literal["last", "product", "root"] = "last"  # score and factor: "last" multiplies what was chosen by the
    # score alone; for the others, the product or its root is the score from the beginning
    factor_threshold: Number = -1  # a prior is dropped unless its factor is above it
    max_per_img: Optional[Count] = None  # at most this many boxes are kept, the best; None: all
    nms_resized: bool = False  # NMS sees boxes in pixels of the resized picture; False: of the picture as it came in
    multiplied_back: bool = False  # boxes are multiplied by original / resized size; False: divided, see rescale

    def __post_init__(self):
        """Check what no single field can."""
        if self.combined != "last" and not self.factor:
            raise ValueError(f"combined is {self.combined!r}, but there is no factor")
        if self.softmax and self.one_class:
            raise ValueError("softmax and one_class exclude each other")


class Queries(Settings, kw_only=True):
    """From the answers to queries, or from peaks, to detections."""

    score_threshold: Number = -1  # boxes are dropped unless their score is above it
    max_per_img: Count  # at most this many boxes are kept, the best
    multiplied_back: bool = False  # as in Head


class Export(Settings, kw_only=True, omit_defaults=False):
    """What the files of every export say, whatever the family."""

    format: Literal[2] = FORMAT
    type: str  # the family
    pair: Text = ""  # an id that the files of one export share
    networks: Tuple[Text, ...] = ()  # the names of these files
    source: Dict[str, Any] = {}  # where the weights come from; for people
    classes: Annotated[Tuple[Text, ...], msgspec.Meta(min_length=1)]  # a name may be empty: no such class was trained
    preprocess: Preprocess


def check_levels(rois, anchors):
    """Refuse RoIs that read more levels than there are: ValueError."""
    if len(rois.strides) > len(anchors.strides):
        raise ValueError(f"{len(rois.strides)} levels for RoIs of {len(anchors.strides)}")


class FasterRCNNSettings(Export, kw_only=True):
    """What Faster R-CNN's networks cannot know."""

    type: Literal["faster_rcnn"] = "faster_rcnn"
    proposals: Proposals
    rois: RoIs
    head: Head

    def __post_init__(self):
        """Check what no single field can."""
        check_levels(self.rois, self.proposals.anchors)


class CascadeRCNNSettings(FasterRCNNSettings, kw_only=True):
    """What Cascade R-CNN's networks cannot know."""

    type: Literal["cascade_rcnn"] = "cascade_rcnn"
    refinements: Annotated[Tuple[Refinement, ...], msgspec.Meta(min_length=1)]  # all stages but the last, the head


class MaskRCNNSettings(FasterRCNNSettings, kw_only=True):
    """What Mask R-CNN's networks cannot know."""

    type: Literal["mask_rcnn"] = "mask_rcnn"
    masks: Masks

    def __post_init__(self):
        """Check what no single field can."""
        super().__post_init__()
        check_levels(self.masks.rois, self.proposals.anchors)


class PointRendSettings(MaskRCNNSettings, kw_only=True):
    """What PointRend's networks cannot know."""

    type: Literal["point_rend"] = "point_rend"
    points: Points


class CascadeMaskRCNNSettings(CascadeRCNNSettings, kw_only=True):
    """What Cascade Mask R-CNN's networks cannot know."""

    type: Literal["cascade_mask_rcnn"] = "cascade_mask_rcnn"
    masks: Masks

    def __post_init__(self):
        """Check what no single field can."""
        super().__post_init__()
        check_levels(self.masks.rois, self.proposals.anchors)


class RetinaNetSettings(Export, kw_only=True):
    """What the network of a one-stage detector with anchors cannot know."""

    type: Literal["retina_net"] = "retina_net"
    anchors: CellAnchors
    deltas: Coder
    max_shift: Optional[Positive] = None  # a box's centre moves no further, along each axis; None: as far as it may
    head: Dense


class PAASettings(RetinaNetSettings, kw_only=True):
    """What the network of PAA cannot know."""

    type: Literal["paa"] = "paa"


class FCOSSettings(Export, kw_only=True):
    """What the network of a one-stage detector without anchors cannot know."""

    type: Literal["fcos"] = "fcos"
    points: CellPoints
    head: Dense


class TOODSettings(FCOSSettings, kw_only=True):
    """What the network of TOOD cannot know."""

    type: Literal["tood"] = "tood"


class YOLOSettings(Export, kw_only=True):
    """What the network of a YOLO cannot know."""

    type: Literal["yolo"] = "yolo"
    anchors: CellAnchors
    within_cell: bool  # a box's centre is in its cell: a sigmoid says where; False: it moves by any number of strides
    head: Dense


class CenterNetSettings(Export, kw_only=True):
    """What the network of CenterNet cannot know."""

    type: Literal["center_net"] = "center_net"
    head: Queries


class DETRSettings(Export, kw_only=True):
    """What the network of DETR cannot know."""

    type: Literal["detr"] = "detr"
    head: Queries


class SettingsError(ValueError):
    """A value does not fit; the message names it and says why."""


def read(text, kind):
    """Return the settings of a class that a JSON text holds; SettingsError if it does not."""
    try:
        return msgspec.json.decode(text, type=kind)
    except msgspec.ValidationError as error:
        reason, _, place = str(error).partition(" - at `$")
        place = place.strip("`.") or "detector"
        raise SettingsError(f"{place}: {reason[0].lower()}{reason[1:]}") from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SettingsError(f"not JSON ({error})") from error
    except RecursionError as error:
        raise SettingsError("nested too deeply") from error


def write(settings):
    """Return settings as a JSON text that `read` accepts; SettingsError if a value does not fit."""
    try:
        text = msgspec.json.encode(settings)
    except (TypeError, ValueError, OverflowError) as error:
        raise SettingsError(str(error)) from error
    read(text, type(settings))
    return text.decode()


# What can be changed after an export: everything else is built into the networks, or was fixed when they were trained.
CHANGEABLE = {
    "scale", "nms_pre", "min_bbox_size", "score_threshold", "iou_threshold", "nms_class_agnostic", "soft_min_score",
    "max_per_img", "threshold",
}  # fmt: skip


def changeable(settings, prefix=""):
    """Return the names of the settings that can be changed, with dots: "head.score_threshold"."""
    names = []
    for field in settings.__struct_fields__:
        value = getattr(settings, field)
        if isinstance(value, Settings):
            names += changeable(value, f"{prefix}{field}.")
        elif field in CHANGEABLE:
            names.append(f"{prefix}{field}")
    return names


def with_option(settings, name, text):
    """Return the settings with another value for one that can be changed, given as JSON; else SettingsError."""
    if name not in changeable(settings):
        raise SettingsError(f"{name} cannot be set; these can: {', '.join(changeable(settings))}")
    try:
        value = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeEncodeError) as error:
        raise SettingsError(f"{name}={text}: not a number, true, false, null, or numbers as in [1, 2]") from error
    return read(write(changed(settings, name, value)), type(settings))


def changed(settings, name, value):
    """Return the settings with another value for one of them, named with dots: "head.score_threshold"."""
    first, _, rest = name.partition(".")
    if rest:
        value = changed(getattr(settings, first), rest, value)
    return msgspec.structs.replace(settings, **{first: value})
