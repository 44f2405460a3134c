// Vectors of VECTOR_BYTES bytes through the compiler's vector extension, with the few functions the kernels
// need. Included inside the namespace of one instruction set; no include guard on purpose.

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <typename T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float Real __attribute__((vector_size(VECTOR_BYTES)));
  typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(VECTOR_BYTES)));
  typedef uint16_t Short __attribute__((vector_size(VECTOR_BYTES / 2)));
  typedef float Half __attribute__((vector_size(VECTOR_BYTES / 2)));
};
template <>
struct VectorOf<double> {
  typedef double Real __attribute__((vector_size(VECTOR_BYTES)));
  typedef int64_t Int __attribute__((vector_size(VECTOR_BYTES)));
};

template <typename T>
using Lane = std::conditional_t<std::is_same_v<T, float>, int32_t, int64_t>;
template <typename T>
using Vec = typename VectorOf<T>::Real;
template <typename T>
using Mask = typename VectorOf<T>::Int;
template <typename T>
constexpr int width = VECTOR_BYTES / sizeof(T);

template <typename T>
DYNLOSS_ALWAYS_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

// f(0), ..., f(n - 1) without a loop: arrays indexed so can live in registers.
template <int n, typename F>
DYNLOSS_ALWAYS_INLINE void unrolled(F&& f) {
  [&]<int... i>(std::integer_sequence<int, i...>)
      DYNLOSS_ALWAYS_INLINE_LAMBDA { (f(i), ...); }(std::make_integer_sequence<int, n>());
}

// `Classes` is the number of classes where the compiler may know it, so that a tile stays in registers and is
// transposed with no more shuffles than it needs; 0 serves all other numbers.
template <int Classes, typename F>
DYNLOSS_ALWAYS_INLINE void for_classes(int64_t num_classes, F&& f) {
  if constexpr (Classes > 0)
    unrolled<Classes>(f);
  else
    for (int64_t c = 0; c < num_classes; ++c) f(c);
}

// ---- loads and stores, with conversion from and to the storage type

template <typename T>
DYNLOSS_ALWAYS_INLINE Vec<T> load(const T* p) {
  Vec<T> x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}

template <typename T>
DYNLOSS_ALWAYS_INLINE void store(T* p, Vec<T> x) {
  std::memcpy(p, &x, sizeof(x));
}

using Bits = VectorOf<float>::Unsigned;
using Shorts = VectorOf<float>::Short;

DYNLOSS_ALWAYS_INLINE Bits load_shorts(const void* p) {
  Shorts h;
  std::memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, Bits);
}

DYNLOSS_ALWAYS_INLINE void store_shorts(void* p, Bits x) {
  const Shorts h = __builtin_convertvector(x, Shorts);
  std::memcpy(p, &h, sizeof(h));
}

DYNLOSS_ALWAYS_INLINE Vec<float> load(const BFloat16* p) { return (Vec<float>)(load_shorts(p) << 16); }

DYNLOSS_ALWAYS_INLINE void store(BFloat16* p, Vec<float> x) {
  const Bits bits = (Bits)x;
  const Bits nearest_even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  store_shorts(p, x == x ? nearest_even : Bits{} + 0x7fc0u);
}

// A half's exponent is re-biased by a multiplication, which also turns its denormals into normal floats.
DYNLOSS_ALWAYS_INLINE Vec<float> load(const Half* p) {
  const Bits half = load_shorts(p);
  const Bits magnitude = (half & 0x7fffu) << 13;
  const Vec<float> finite = (Vec<float>)magnitude * 0x1p112f;
  const Bits special = magnitude | 0x7f800000u;
  const Bits bits = (half & 0x7c00u) == 0x7c00u ? special : (Bits)finite;
  return (Vec<float>)(bits | ((half & 0x8000u) << 16));
}

DYNLOSS_ALWAYS_INLINE void store(Half* p, Vec<float> x) {
  const Bits bits = (Bits)x;
  const Bits magnitude = bits & 0x7fffffffu;
  const Bits normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - (112u << 23)) >> 13;
  // Adding 0.5 makes the float unit round at the place value of a half's denormals.
  const Bits denormal = (Bits)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  Bits half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? Bits{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Bits{} + 0x7e00u : half;
  store_shorts(p, half | ((bits >> 16) & 0x8000u));
}

// The first `count` elements; the rest is `fill`.
template <typename T, typename S>
DYNLOSS_ALWAYS_INLINE Vec<T> load_part(const S* p, int count, T fill) {
  if (count > width<T>) __builtin_unreachable();  // else the compiler warns of it
  S padded[width<T>] = {};
  std::memcpy(padded, p, count * sizeof(S));
  Vec<T> x = load(padded);
  for (int i = count; i < width<T>; ++i) x[i] = fill;
  return x;
}

template <typename T, typename S>
DYNLOSS_ALWAYS_INLINE void store_part(S* p, Vec<T> x, int count) {
  S padded[width<T>];
  store(padded, x);
  std::memcpy(p, padded, count * sizeof(S));
}

// One label per lane, and which of them are not to be ignored. The low half of a label tells it from all
// other classes (little endian); only ignore_index may need the rest.
template <typename T>
struct Labels {
  Mask<T> index, counted;

  // `p` has room for a vector's width of labels.
  DYNLOSS_ALWAYS_INLINE Labels(const int64_t* p, int64_t ignore_index) {
    Mask<double> halves[sizeof(double) / sizeof(T)];
    std::memcpy(halves, p, sizeof(halves));
    index = low_parts(halves);
    for (auto& half : halves) half = half != ignore_index;
    counted = low_parts(halves);
  }

 private:
  DYNLOSS_ALWAYS_INLINE static Mask<T> low_parts(const Mask<double>* halves) {
    if constexpr (std::is_same_v<T, double>)
      return halves[0];
    else
      return even_lanes((Mask<float>)halves[0], (Mask<float>)halves[1],
                        std::make_index_sequence<width<float>>());
  }
  template <size_t... Lane>
  DYNLOSS_ALWAYS_INLINE static Mask<float> even_lanes(Mask<float> a, Mask<float> b,
                                                      std::index_sequence<Lane...>) {
    return __builtin_shufflevector(a, b, (2 * Lane)...);
  }
};

// A sum per lane in float64.
template <typename T>
DYNLOSS_ALWAYS_INLINE void add_wide(Vec<double>& sums, Vec<T> x) {
  if constexpr (std::is_same_v<T, double>) {
    sums += x;
  } else {
    typename VectorOf<float>::Half halves[2];
    std::memcpy(halves, &x, sizeof(x));
    sums += __builtin_convertvector(halves[0], Vec<double>) + __builtin_convertvector(halves[1], Vec<double>);
  }
}

// ---- arithmetic

template <typename V>
DYNLOSS_ALWAYS_INLINE V maximum(V a, V b) {
  return a > b ? a : b;
}

template <typename T>
DYNLOSS_ALWAYS_INLINE T horizontal_max(Vec<T> x) {
  T top = x[0];
  for (int i = 1; i < width<T>; ++i) top = x[i] > top ? x[i] : top;
  return top;
}

template <typename T>
DYNLOSS_ALWAYS_INLINE T horizontal_sum(Vec<T> x) {
  T parts[width<T>];
  store(parts, x);
  for (int half = width<T> / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) parts[i] += parts[i + half];
  return parts[0];
}

// The lanes of a with the bit B and those of b without it change places.
template <typename T, int B, size_t... Lane>
DYNLOSS_ALWAYS_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::index_sequence<Lane...>) {
  const Vec<T> low = __builtin_shufflevector(a, b, ((Lane & B) ? width<T> + Lane - B : Lane)...);
  const Vec<T> high = __builtin_shufflevector(a, b, ((Lane & B) ? width<T> + Lane : Lane + B)...);
  a = low;
  b = high;
}

template <typename T, int B>
DYNLOSS_ALWAYS_INLINE Vec<T> sum_of_halves(Vec<T> a, Vec<T> b) {
  exchange<T, B>(a, b, std::make_index_sequence<width<T>>());
  return a + b;
}

// The sum of the lanes of x[i] in lane i, for as many vectors as there are lanes.
template <typename T, int B = width<T> / 2>
DYNLOSS_ALWAYS_INLINE Vec<T> horizontal_sums(const Vec<T>* x) {
  if constexpr (B == 0) {
    return x[0];
  } else {
    Vec<T> halves[B];
    unrolled<B>([&](int i) DYNLOSS_ALWAYS_INLINE_LAMBDA { halves[i] = sum_of_halves<T, B>(x[i], x[i + B]); });
    return horizontal_sums<T, B / 2>(halves);
  }
}

// exp(x) for x <= 0: x = n log 2 + r, and exp r = 1 + r q with a polynomial q in r (relative error 1e-8,
// 2e-17). Adding a large constant rounds to n and leaves n + bias in the low bits: the exponent of 2^n. Below
// the smallest normal number: 0. NaN stays NaN.
template <typename T>
struct ExpParts {
  Vec<T> r, q, power;
  Mask<T> none;  // where 0 is returned

  DYNLOSS_ALWAYS_INLINE_MEMBER Vec<T> exp() const { return none ? Vec<T>{} : (q * r + T(1)) * power; }
  // exp(x) - 1 with all its digits.
  DYNLOSS_ALWAYS_INLINE_MEMBER Vec<T> exp_less_1() const {
    return none ? broadcast(T(-1)) : q * r * power + (power - T(1));
  }
};

DYNLOSS_ALWAYS_INLINE ExpParts<float> exp_parts(Vec<float> x) {
  const Vec<float> shifted = x * 1.44269504088896341f + (12582912.0f + 127.0f);
  const Vec<float> n = shifted - (12582912.0f + 127.0f);
  // With a fused multiply-add log 2 need not be split: as a float it is right to 2e-9.
  const Vec<float> r = VECTOR_BYTES > 16 ? x - n * 0.693147180559945309f
                                         : (x - n * 0.693145751953125f) - n * 1.42860682030941723212e-6f;
  Vec<float> q = r * 0.00139261835877134945f + 0.00836317905272257737f;
  q = q * r + 0.0416665546172045742f;
  q = q * r + 0.166665769896987757f;
  q = q * r + 0.5f;
  q = q * r + 1.0f;
  const Vec<float> power = (Vec<float>)((Bits)shifted << 23);
  return {r, q, power, x < -87.0f};
}

DYNLOSS_ALWAYS_INLINE ExpParts<double> exp_parts(Vec<double> x) {
  const Vec<double> shifted = x * 1.4426950408889634074 + (6755399441055744.0 + 1023.0);
  const Vec<double> n = shifted - (6755399441055744.0 + 1023.0);
  const Vec<double> r = (x - n * 6.93147180369123816490e-1) - n * 1.90821492927058770002e-10;
  Vec<double> q = r * 2.51003854955103191e-8 + 2.76200884454097482e-7;
  q = q * r + 2.75572684599970648e-6;
  q = q * r + 2.48015212959543751e-5;
  q = q * r + 1.98412698630536169e-4;
  q = q * r + 1.38888889172137169e-3;
  q = q * r + 8.33333333333006183e-3;
  q = q * r + 4.16666666666241279e-2;
  q = q * r + 1.66666666666666675e-1;
  q = q * r + 0.500000000000000102;
  q = q * r + 1.0;
  const Vec<double> power = (Vec<double>)((Mask<double>)shifted << 52);
  return {r, q, power, x < -708.0};
}

template <typename V>
DYNLOSS_ALWAYS_INLINE V exp_nonpositive(V x) {
  return exp_parts(x).exp();
}

template <typename T>
DYNLOSS_ALWAYS_INLINE Vec<T> hyperbolic_tangent(Vec<T> x) {
  const Vec<T> less_1 = exp_parts(x > 0 ? T(-2) * x : T(2) * x).exp_less_1();
  const Vec<T> size = -less_1 / (T(2) + less_1);
  return x > 0 ? size : -size;
}

// log(x) for finite x >= 1: exponent · log 2 + log of the mantissa m in [√½, √2) as 2 artanh((m - 1) / (m +
// 1)). rest: x - 1 with all its digits, which m - 1 is where the exponent is 0. Anything else comes back as
// NaN through x - x.
DYNLOSS_ALWAYS_INLINE Vec<float> log_of_sum(Vec<float> x, Vec<float> rest) {
  Mask<float> exponent = ((Mask<float>)x >> 23) - 127;
  Vec<float> m = (Vec<float>)(((Mask<float>)x & 0x007fffff) | 0x3f800000);
  const Mask<float> large = m > 1.41421356f;
  m = large ? m * 0.5f : m;
  exponent -= large;
  const Vec<float> s = (exponent == 0 ? rest : m - 1.0f) / (m + 1.0f);
  const Vec<float> s2 = s * s;
  Vec<float> p = s2 * (2.0f / 9) + 2.0f / 7;
  p = p * s2 + 2.0f / 5;
  p = p * s2 + 2.0f / 3;
  p = p * s2 * s + 2.0f * s;
  return __builtin_convertvector(exponent, Vec<float>) * 0.693147180559945309f + p + (x - x);
}

DYNLOSS_ALWAYS_INLINE Vec<double> log_of_sum(Vec<double> x, Vec<double> rest) {
  Mask<double> exponent = ((Mask<double>)x >> 52) - 1023;
  Vec<double> m = (Vec<double>)(((Mask<double>)x & 0x000fffffffffffffLL) | 0x3ff0000000000000LL);
  const Mask<double> large = m > 1.4142135623730951;
  m = large ? m * 0.5 : m;
  exponent -= large;
  const Vec<double> s = (exponent == 0 ? rest : m - 1.0) / (m + 1.0);
  const Vec<double> s2 = s * s;
  Vec<double> p = s2 * (2.0 / 21) + 2.0 / 19;
  p = p * s2 + 2.0 / 17;
  p = p * s2 + 2.0 / 15;
  p = p * s2 + 2.0 / 13;
  p = p * s2 + 2.0 / 11;
  p = p * s2 + 2.0 / 9;
  p = p * s2 + 2.0 / 7;
  p = p * s2 + 2.0 / 5;
  p = p * s2 + 2.0 / 3;
  p = p * s2 * s + 2.0 * s;
  return __builtin_convertvector(exponent, Vec<double>) * 0.693147180559945309417 + p + (x - x);
}
