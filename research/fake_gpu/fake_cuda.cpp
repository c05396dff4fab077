// Stands for a CUDA device where there is none, so that autograd and streams accept fake CUDA tensors. No call does anything.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

using namespace c10;

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const noexcept override { return getDevice(); }
  Device getDevice() const noexcept override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream getDefaultStream(Device device) const noexcept override { return getStream(device); }
  Stream getNewStream(Device device, int) const noexcept override { return getStream(device); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const noexcept override {}
  void block(void*, const Stream&) const noexcept override {}
  bool queryEvent(void*) const noexcept override { return true; }
};

// Autograd asks the hooks, not the guard, whether there is a device.
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
  const at::Generator& getDefaultGenerator(DeviceIndex) const override { return at::detail::getDefaultCPUGenerator(); }
  at::Generator getNewGenerator(DeviceIndex) const override { return at::detail::createCPUGenerator(); }
};

static Guard guard;

extern "C" void stand_in() { impl::device_guard_impl_registry[(size_t)DeviceType::CUDA].store(&guard); }

__attribute__((constructor)) static void enter() {
  at::CUDAHooksRegistry()->SetTerminate(false);
  at::CUDAHooksRegistry()->Register(
      "CUDAHooks", [](at::CUDAHooksArgs) -> std::unique_ptr<at::CUDAHooksInterface> { return std::make_unique<Hooks>(); },
      REGISTRY_PREFERRED);
}
