// Runs a network that `anncvt compile` wrote: classify MODEL.so INPUT [--logits]
//
// INPUT is a picture (binary PGM or PPM, 8 bits, of the network's size) or a raw tensor: float32, or uint8 for a network
// of integers, [N, C, H, W] in the processor's byte order. Prints the best classes of each image, or all logits.

#include <tvm/ffi/container/map.h>
#include <tvm/ffi/container/tensor.h>
#include <tvm/ffi/extra/json.h>
#include <tvm/ffi/extra/module.h>
#include <tvm/ffi/function.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace ffi = tvm::ffi;
namespace json = tvm::ffi::json;

namespace {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

std::string ReadFile(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw Error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

// A file ends with its manifest, a SHA-256 of everything before (32 bytes), the manifest's length (8) and a magic (8).
json::Object ReadManifest(const std::string& path) {
  const std::string file = ReadFile(path), magic = "ANNCVT01";
  if (file.size() < 48 || file.compare(file.size() - 8, 8, magic) != 0) {
    throw Error(path + " is no compiled network, or cut off");
  }
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | static_cast<unsigned char>(file[file.size() - 16 + i]);
  if (length > file.size() - 48) throw Error(path + " is damaged");
  return json::Parse(file.substr(file.size() - 48 - length, length)).cast<json::Object>();
}

// What a processor lacks would end the process at the first such instruction.
void CheckProcessor(const json::Object& manifest) {
#ifdef __aarch64__
  const std::string architecture = "aarch64", key = "Features";
#else
  const std::string architecture = "x86_64", key = "flags";
#endif
  const json::Object target = manifest["target"].cast<json::Object>();
  const std::string wanted = target["architecture"].cast<ffi::String>();
  if (wanted != architecture) throw Error("compiled for " + wanted + ", this machine is " + architecture);
  std::ifstream cpuinfo("/proc/cpuinfo");
  std::string line, flags;
  while (flags.empty() && std::getline(cpuinfo, line)) {
    if (line.rfind(key, 0) == 0) flags = line.substr(line.find(':') + 1) + " ";
  }
  if (flags.empty()) return;
  for (const ffi::Any& flag : target["flags"].cast<json::Array>()) {
    const std::string name = flag.cast<ffi::String>();
    if (flags.find(" " + name + " ") == std::string::npos) throw Error("this processor lacks " + name);
  }
}

std::vector<int64_t> Shape(const json::Object& tensor) {
  std::vector<int64_t> sizes;
  const json::Array shape = tensor["shape"].cast<json::Array>();
  for (size_t i = 1; i < shape.size(); ++i) sizes.push_back(shape[i].cast<int64_t>());  // the first is "batch"
  return sizes;
}

int64_t Product(const std::vector<int64_t>& sizes) {
  return std::accumulate(sizes.begin(), sizes.end(), int64_t{1}, std::multiplies<int64_t>());
}

// [N, sizes...], zeros, where compiled code expects it: at a multiple of 64.
ffi::Tensor Empty(int64_t count, const std::vector<int64_t>& sizes, DLDataType dtype) {
  struct Allocator {
    void AllocData(DLTensor* tensor) {
      const size_t bytes = (ffi::GetDataSize(*tensor) + 63) / 64 * 64;
      tensor->data = std::aligned_alloc(64, std::max<size_t>(bytes, 64));
      if (tensor->data == nullptr) throw std::bad_alloc();
    }
    void FreeData(DLTensor* tensor) { std::free(tensor->data); }
  };
  std::vector<int64_t> shape = {count};
  shape.insert(shape.end(), sizes.begin(), sizes.end());
  return ffi::Tensor::FromNDAlloc(Allocator(), ffi::Shape(shape), dtype, DLDevice{kDLCPU, 0});
}

bool IsPicture(const std::string& file) { return file.size() > 2 && file[0] == 'P' && (file[1] == '5' || file[1] == '6'); }

// The bytes [C, H, W] of a binary PGM or PPM.
std::vector<uint8_t> Pixels(const std::string& file, const std::vector<int64_t>& size) {
  std::istringstream stream(file);
  auto number = [&stream] {
    std::string word;
    while (stream >> word && word[0] == '#') std::getline(stream, word);
    return std::atoll(word.c_str());
  };
  stream.ignore(2);
  const int64_t channels = file[1] == '5' ? 1 : 3;
  const int64_t width = number(), height = number(), top = number();
  stream.get();
  if (top != 255) throw Error("a picture of other than 8 bits");
  if (size != std::vector<int64_t>{channels, height, width}) {
    std::ostringstream message;
    message << "a picture of " << channels << "x" << height << "x" << width << ", the network takes " << size[0] << "x"
            << size[1] << "x" << size[2];
    throw Error(message.str());
  }
  std::vector<char> rows(channels * height * width);
  if (!stream.read(rows.data(), rows.size())) throw Error("the picture is cut off");
  std::vector<uint8_t> pixels(rows.size());
  for (int64_t i = 0; i < height * width; ++i) {
    for (int64_t c = 0; c < channels; ++c) pixels[c * height * width + i] = static_cast<uint8_t>(rows[i * channels + c]);
  }
  return pixels;
}

// `value[channel]`, or the one value for all of them.
double OfChannel(const json::Array& values, int64_t channel) { return values[values.size() == 1 ? 0 : channel].cast<double>(); }

// INPUT as what the network takes. Networks of integers take pixels as they are; their normalisation is inside.
ffi::Tensor ReadInput(const std::string& path, const json::Object& manifest) {
  const json::Object input = manifest["input"].cast<json::Object>();
  const std::vector<int64_t> size = Shape(input);
  const bool integers = input["dtype"].cast<ffi::String>() == "uint8";
  const DLDataType dtype = integers ? DLDataType{kDLUInt, 8, 1} : DLDataType{kDLFloat, 32, 1};
  const int64_t elements = Product(size), bytes = elements * (integers ? 1 : 4);
  const std::string file = ReadFile(path);
  if (!IsPicture(file)) {
    if (file.empty() || file.size() % bytes != 0) {
      throw Error(path + " is no picture and no tensor of whole images of " + std::to_string(bytes) + " bytes");
    }
    const ffi::Tensor images = Empty(file.size() / bytes, size, dtype);
    std::memcpy(images.data_ptr(), file.data(), file.size());
    return images;
  }
  const std::vector<uint8_t> pixels = Pixels(file, size);
  const ffi::Tensor image = Empty(1, size, dtype);
  if (integers) {
    std::memcpy(image.data_ptr(), pixels.data(), pixels.size());
    return image;
  }
  const json::Object preprocess = manifest["preprocess"].cast<json::Object>();
  const json::Array mean = preprocess["mean"].cast<json::Array>(), deviation = preprocess["std"].cast<json::Array>();
  float* values = static_cast<float*>(image.data_ptr());
  for (int64_t i = 0; i < elements; ++i) {
    const int64_t channel = i / (elements / size[0]);
    values[i] = static_cast<float>((pixels[i] / 255.0 - OfChannel(mean, channel)) / OfChannel(deviation, channel));
  }
  return image;
}

// Calls the functions for the largest batches that fit, then those for smaller ones; 1 is always there.
std::vector<double> Run(const ffi::Module& machine, const json::Object& manifest, const ffi::Tensor& images) {
  std::vector<std::pair<int64_t, std::string>> functions;
  for (const auto& [name, size] : manifest["functions"].cast<json::Object>()) {
    functions.emplace_back(size.cast<int64_t>(), std::string(name.cast<ffi::String>()));
  }
  std::sort(functions.rbegin(), functions.rend());
  const json::Object output = manifest["output"].cast<json::Object>();
  const bool integers = output["dtype"].cast<ffi::String>() == "int32";
  const int64_t row = Product(Shape(output)), count = images.shape()[0];
  const std::vector<int64_t> size = Shape(manifest["input"].cast<json::Object>());
  const int64_t bytes = Product(size) * images.dtype().bits / 8;
  std::vector<double> logits;
  int64_t start = 0;
  for (const auto& [batch, name] : functions) {
    const ffi::Function function = machine->GetFunction(name).value();
    for (; count - start >= batch; start += batch) {
      const ffi::Tensor part = Empty(batch, size, images.dtype());
      std::memcpy(part.data_ptr(), static_cast<const char*>(images.data_ptr()) + start * bytes, batch * bytes);
      const ffi::Tensor result = function(part).cast<ffi::Tensor>();
      for (int64_t i = 0; i < batch * row; ++i) {
        logits.push_back(integers ? static_cast<const int32_t*>(result.data_ptr())[i]
                                  : static_cast<const float*>(result.data_ptr())[i]);
      }
    }
  }
  return logits;
}

void PrintBest(const double* logits, int64_t count, double scale, const json::Object& manifest) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [logits](int64_t a, int64_t b) { return logits[a] > logits[b]; });
  const ffi::Any names = manifest.Get("classes").value_or(nullptr);
  for (int64_t i = 0; i < std::min<int64_t>(count, 5); ++i) {
    std::string name = std::to_string(order[i]);
    if (auto listed = names.as<json::Array>(); listed && order[i] < static_cast<int64_t>(listed->size())) {
      name = (*listed)[order[i]].cast<ffi::String>();
    }
    std::printf("%s\t%.6g\n", name.c_str(), logits[order[i]] * scale);
  }
}

int Main(const std::vector<std::string>& arguments) {
  if (arguments.size() < 2 || arguments.size() > 3 || (arguments.size() == 3 && arguments[2] != "--logits")) {
    std::fprintf(stderr, "usage: classify MODEL.so INPUT [--logits]\n");
    return 2;
  }
  const json::Object manifest = ReadManifest(arguments[0]);
  CheckProcessor(manifest);
  const std::string path = arguments[0].find('/') == std::string::npos ? "./" + arguments[0] : arguments[0];
  const ffi::Module machine = ffi::Module::LoadFromFile(path)->GetFunction("vm_load_executable").value()().cast<ffi::Module>();
  constexpr int kPooled = 2;
  machine->GetFunction("vm_initialization").value()(static_cast<int>(kDLCPU), 0, kPooled);

  const std::vector<double> logits = Run(machine, manifest, ReadInput(arguments[1], manifest));
  const json::Object output = manifest["output"].cast<json::Object>();
  const int64_t row = Product(Shape(output));
  for (size_t at = 0; at < logits.size(); at += row) {
    if (arguments.size() == 3) {
      for (int64_t i = 0; i < row; ++i) std::printf("%.9g%c", logits[at + i], i + 1 < row ? ' ' : '\n');
    } else {
      if (at > 0) std::printf("\n");
      PrintBest(&logits[at], row, output.Get("scale").value_or(1.0).cast<double>(), manifest);
    }
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return Main(std::vector<std::string>(argv + 1, argv + argc));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
